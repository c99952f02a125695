"""The demo's page in a real browser: what a person does there, light and dark, also at the width of a phone."""

import shutil
from itertools import combinations
from pathlib import Path

import pytest

pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")

from tests.demo.conftest import opened  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium"
)
MARKUP = "<img src=x onerror=alert(1)><script>alert(2)</script> {{value}} ${1+1} **bold**"
BOXES = """() => [...document.querySelectorAll(
    'button, input, textarea, label, h1, #board .card, #board .asked, #board .bar > *')]
  .filter(own => own.checkVisibility({checkOpacity: true, checkVisibilityCSS: true}))
  .filter(own => !own.closest('#images, .toast-wrap'))
  .map(own => ({own, box: own.getBoundingClientRect()})).filter(({box}) => box.width > 1 && box.height > 1)
  .map(({own, box}, number, all) => ({name: own.tagName + ' ' + own.innerText.slice(0, 30),
    box: [box.left, box.top, box.right, box.bottom],
    inside: all.map(other => other.own.contains(own) || own.contains(other.own))}))"""
"""What is to be seen, where, and what it contains or lies in."""
CONTRAST = """own => {
  const light = colour => { const [r, g, b] = colour.match(/[\\d.]+/g).map(Number).map(value => value / 255)
    .map(value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b };
  const text = light(getComputedStyle(own).color);
  const ground = light(getComputedStyle(own.closest('.card')).backgroundColor);
  return (Math.max(text, ground) + 0.05) / (Math.min(text, ground) + 0.05) }"""
"""Of a text of a card, as WCAG 2 defines it: 4.5 is enough."""


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def film(tmp_path):
    """A video of a second that browsers play."""
    from tests.data.test_video import write  # it skips without PyAV

    return Path(write(tmp_path / "film.mp4", count=25))


@pytest.fixture
def open_page(browser, address):
    """Opens the page in a window of its own; what went wrong in it fails the test."""
    windows, faults = [], []

    def run(width: int = 1280, scheme="light"):
        windows.append(browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme))
        page = windows[-1].new_page()
        page.set_default_timeout(15_000)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("dialog", lambda dialog: faults.append(dialog.message))
        page.goto(address)
        page.get_by_role("button", name="Ask", exact=True).wait_for()
        return page

    yield run
    for window in windows:
        window.close()
    assert not faults


def ask(page, question: str, cards: int, choices: str = "") -> None:
    """Types a question and waits for the answers."""
    page.get_by_label("Question", exact=True).last.fill(question)
    page.get_by_label("Choices").fill(choices)
    page.get_by_role("button", name="Ask", exact=True).click()
    page.locator("#board .turn").first.get_by_text(question).wait_for()
    playwright.expect(page.locator("#board .turn").first.locator(".card.done")).to_have_count(cards)


def compare(page) -> None:
    """Has the base answer too."""
    page.get_by_label("Who answers").click()
    page.get_by_role("option", name="base").click()
    page.keyboard.press("Escape")


def overlapping(page) -> list[tuple[str, str]]:
    """The names of any two that lie over each other and not in each other."""
    boxes = page.evaluate(BOXES)
    return [
        (one["name"], other["name"])
        for (first, one), (second, other) in combinations(enumerate(boxes), 2)
        if not one["inside"][second]
        and min(one["box"][2], other["box"][2]) - max(one["box"][0], other["box"][0]) > 1
        and min(one["box"][3], other["box"][3]) - max(one["box"][1], other["box"][1]) > 1
    ]


def test_a_person_compares_finetunes_about_an_uploaded_image(open_page, red, tmp_path):
    page = open_page()
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no more")
    upload = page.locator("#images input[type=file]").first
    upload.set_input_files([tmp_path / "broken.png", red])
    page.get_by_text("left out: broken.png").wait_for()
    playwright.expect(page.locator("#images img")).to_have_count(1)
    compare(page)
    ask(page, "what color is it?", cards=2, choices="red, blue, green")
    assert page.locator("#board .card header b").all_inner_texts() == ["default", "base"]
    assert page.locator("#board .bar").count() == 6
    ask(page, MARKUP, cards=2)
    assert page.locator("#board .asked b").first.inner_text() == MARKUP
    assert page.locator("#board img, #board script").count() == 0
    page.get_by_role("button", name="New conversation").click()
    playwright.expect(page.locator("#board .turn")).to_have_count(0)


def test_a_click_on_an_example_asks_it(open_page, source):
    page = open_page()
    page.locator("#examples button.thumbnail-item, #examples .thumbnail-item").first.click()
    playwright.expect(page.locator("#board .card.done")).to_have_count(1)
    assert page.locator("#board .truth").inner_text() == f"truth: {source.examples[0].truth}"
    page.get_by_text("Copy as code").click()
    page.get_by_text(source.examples[0].images[0].name[-20:]).first.wait_for()
    ask(page, "is it something else?", cards=1)
    assert page.locator("#board .turn").first.locator(".truth").count() == 0
    assert page.locator("#board .truth").count() == 1


def test_an_examples_question_is_shown_as_it_was_written(browser, source, monkeypatch):
    monkeypatch.setattr(source.examples[0], "question", MARKUP)
    with opened(source) as url:
        page, faults = browser.new_page(), []
        page.on("dialog", lambda dialog: faults.append(dialog.message))
        page.goto(url)
        assert page.locator("#examples .caption-label").first.inner_text() == MARKUP
        page.close()
    assert not faults


def test_uploads_keep_their_names(open_page, red, tmp_path):
    page = open_page()
    shutil.copy(red, tmp_path / "it's $1 (red).png")
    page.locator("#images input[type=file]").first.set_input_files(tmp_path / "it's $1 (red).png")
    playwright.expect(page.locator("#images img")).to_have_count(1)
    ask(page, "what color is it?", cards=1)
    page.get_by_text("Copy as code").click()
    page.get_by_text("it's $1 (red).png").first.wait_for()


@pytest.mark.parametrize("width", [1280, 390])
def test_a_video_is_played_and_its_heat_map_has_times(open_page, film, red, width, tmp_path):
    page = open_page(width)
    playwright.expect(page.locator("#frames")).to_have_count(0)
    (tmp_path / "broken.mp4").write_bytes(film.read_bytes()[:400])
    page.locator("#images input[type=file]").first.set_input_files([tmp_path / "broken.mp4", red, film])
    page.get_by_text("left out: broken.mp4").wait_for()
    playwright.expect(page.locator("#images video")).to_have_count(1)
    playwright.expect(page.locator("#images img")).to_have_count(1)
    page.locator(".toast-close").first.click()
    page.get_by_label("Heat map").check()
    page.locator("#frames input[type=number]").fill("4")
    ask(page, "is <image> in <video>?", cards=1)
    titles = page.locator("#board figcaption")
    playwright.expect(titles).to_have_count(5)
    assert titles.all_inner_texts()[-1] == "film.mp4, 1.0 seconds"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert overlapping(page) == []
    page.wait_for_function("document.querySelector('#images video').readyState > 1")


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "light"), (390, "dark")])
def test_nothing_overlaps_and_all_can_be_read(open_page, width, scheme):
    page = open_page(width, scheme)
    compare(page)
    ask(
        page,
        "is red a color, " + "and-so-on" * 12 + "?",
        cards=2,
        choices="red, a longer choice with words, blue",
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert overlapping(page) == []
    assert page.evaluate("document.body.classList.contains('dark')") == (scheme == "dark")
    texts = page.locator("#board .card :is(.text, .choice, .share, .remark, header b)").all()
    assert len(texts) > 8
    assert min(text.evaluate(CONTRAST) for text in texts) > 4.5

"""demo/app.py: the real page, started on a free port and asked by gradio's client."""

import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

import mmpeft
from mmpeft.inference.requests import Completion

gradio = pytest.importorskip("gradio")
client = pytest.importorskip("gradio_client")

from demo.app import LAUNCH, build, main, of_run  # noqa: E402

SCRIPT = "<script>alert(1)</script><img src=x onerror=alert(2)> [x](javascript:alert(3)) $\\href{x}{y}$"


@pytest.fixture(scope="module")
def vlm(tiny_run):
    return mmpeft.load(str(tiny_run), "cpu")


@pytest.fixture(scope="module")
def page(vlm, tiny_run):
    """A client of the page."""
    blocks = build(of_run(vlm, tiny_run))
    _, url, _ = blocks.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, **LAUNCH)
    yield client.Client(url, verbose=False)
    blocks.close()


@pytest.fixture(scope="module")
def red(tiny_data) -> Path:
    return tiny_data / "images" / "red0.png"


def ask(page, image, task="Question", question="what color is it?", finetune="default", choices=""):
    image = client.handle_file(str(image)) if image else None
    return page.predict(image, task, question, finetune, choices, api_name="/answer")


def test_question_and_caption(page, vlm, red):
    answer, seconds, ranking = ask(page, red)
    assert answer == vlm.ask(red, "what color is it?", "default")
    assert ranking == ""
    assert seconds.endswith(" s")
    assert ask(page, red, finetune="base")[0] == vlm.ask(red, "what color is it?", "base")
    assert ask(page, red, "Caption", "")[0] == vlm.caption(red)
    assert ask(page, None, question="is red a color?")[0] == vlm.ask(None, "is red a color?")


def ranking_of(vlm, image):
    return vlm.rank(image, "what color is it?", ["red", "blue", "green"])


def test_typed_choices_are_ranked(page, vlm, red):
    answer, _, ranking = ask(page, red, choices="red, blue,green")
    expected = ranking_of(vlm, red)
    assert answer == expected[0][0]
    assert ranking.splitlines() == [f"{choice}  {score:.4f}" for choice, score in expected]


def test_without_typed_choices_the_runs_own_are_ranked(page, vlm, red, monkeypatch):
    known = {"default": {"vqa": {"": ["red", "blue", "green"]}}}
    monkeypatch.setattr(vlm.manifest, "choices", known)
    answer, _, ranking = ask(page, red)
    assert answer == ranking_of(vlm, red)[0][0]
    assert len(ranking.splitlines()) == 3
    assert ask(page, red, finetune="base")[2] == ""


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    """What the page says beside an answer."""
    told: list[str] = []
    monkeypatch.setattr(gradio, "Warning", told.append)
    return told


def test_a_question_without_an_image_is_told(page, red, warnings):
    ask(page, red)
    assert warnings == []
    for asked in ({}, {"choices": "red,blue"}, {"finetune": "base"}):
        warnings.clear()
        ask(page, None, **asked)
        assert warnings == ["no image: asked about text alone"]


def test_an_answer_without_a_word_is_no_empty_box(page, vlm, red, warnings, monkeypatch):
    monkeypatch.setattr(vlm, "answer", lambda requests: [Completion("") for _ in requests])
    assert ask(page, red, finetune="base")[0] == "(the base ended its answer at once: it wrote nothing)"
    assert warnings == []


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b"<svg onload=alert(1)>", "x.png", "found an SVG drawing"),
        (b"<svg onload=alert(1)>", "x.svg", "found an SVG drawing"),
        (b"", "x.png", "empty"),
        (None, "cut.png", "cannot be decoded"),
    ],
)
def test_bad_images_are_explained(page, red, tmp_path, content, name, message):
    path = tmp_path / name
    path.write_bytes(red.read_bytes()[:60] if content is None else content)
    with pytest.raises(client.exceptions.AppError, match=message) as raised:
        ask(page, path)
    assert "<svg" not in str(raised.value)
    assert "gradio" not in str(raised.value)


def test_too_many_pixels(page, tmp_path):
    Image.new("1", (13_000, 10_000)).save(tmp_path / "large.png")
    with pytest.raises(client.exceptions.AppError, match="128,000,000 pixels"):
        ask(page, tmp_path / "large.png")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"finetune": "nobody"}, "nobody"),
        ({"task": "Delete"}, "Delete"),
        ({"question": " "}, "type a question"),
        ({"question": "x" * 2001}, "type a question of 1 to 2000"),
        ({"choices": "red"}, "choices must be at least two"),
        ({"choices": "<b>, <b>"}, "two different, non-empty answers; got .'&lt;b&gt;'"),
        ({"choices": "x," * 1001}, "type choices of 1 to 2000"),
        ({"question": "<image> and <image>?"}, "2 &lt;image&gt; but 1 images"),
    ],
)
def test_refusals(page, red, changes, message):
    with pytest.raises(client.exceptions.AppError, match=message):
        ask(page, red, **changes)


def test_a_caption_needs_an_image(page):
    with pytest.raises(client.exceptions.AppError, match="a caption needs an image"):
        ask(page, None, "Caption")


def test_an_uploaded_file_too_large_is_refused(page, tmp_path):
    (tmp_path / "large.png").write_bytes(b"\x89PNG" + bytes(21 * 2**20))
    with pytest.raises(Exception, match=r"413|too large|exceeds"):
        ask(page, tmp_path / "large.png")


def test_files_of_the_server_stay_there(page, tiny_run):
    import httpx

    for path in ("/etc/passwd", str(tiny_run / "mmpeft.json")):
        assert httpx.get(f"{page.src}gradio_api/file={path}").status_code in (403, 404)
        with pytest.raises(client.exceptions.AppError):
            page.predict(
                {"path": path, "meta": {"_type": "gradio.FileData"}},
                "Caption",
                "",
                "base",
                api_name="/answer",
            )


def test_markup_stays_text(page, vlm, red, monkeypatch):
    monkeypatch.setattr(vlm, "answer", lambda requests: [Completion(SCRIPT) for _ in requests])
    assert ask(page, red)[0] == SCRIPT
    shown = [
        part for part in page.config["components"] if part["props"].get("label") in ("Answer", "Ranking")
    ]
    assert [part["type"] for part in shown] == ["textbox"] * 2  # which no browser reads as HTML or Markdown


def test_names_and_facts_of_a_run_are_escaped(vlm, tmp_path, monkeypatch):
    monkeypatch.setattr(vlm.manifest, "facts", {SCRIPT: SCRIPT})
    monkeypatch.setitem(vlm.manifest.language, "name", SCRIPT)
    parts = build(of_run(vlm, tmp_path)).get_config_file()["components"]
    texts = [part["props"]["value"] for part in parts if part["type"] == "html"]
    assert len(texts) == 2
    assert not any("<script" in text or "<img" in text for text in texts)


def test_only_the_answer_is_public(page):
    assert list(page.view_api(return_format="dict")["named_endpoints"]) == ["/answer"]


def test_without_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["app.py", "--run", str(tmp_path / "none"), "--share"])
    with pytest.raises(SystemExit, match=r"error: .*`make quickstart`"):
        runpy.run_path("demo/app.py", run_name="__main__")


@pytest.mark.parametrize(
    ("host", "share", "warned"), [("127.0.0.1", False, False), ("0.0.0.0", False, True), ("::1", True, True)]
)
def test_a_page_for_others_warns(tiny_run, monkeypatch, capsys, host, share, warned):
    monkeypatch.setattr(gradio.Blocks, "launch", lambda self, **settings: print(settings))
    main(str(tiny_run), host=host, share=share)
    out, err = capsys.readouterr()
    assert ("no login" in err) == warned
    assert f"'server_name': '{host}'" in out
    assert f"'share': {share}" in out
    assert "'max_file_size': '20mb'" in out

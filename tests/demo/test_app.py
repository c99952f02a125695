"""The demo's page of a run, opened on a free port and asked by gradio's client."""

import base64
import json
import sys
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image, ImageChops, ImageStat

import mmpeft
from mmpeft.adapters.architecture import find_layers
from mmpeft.cli import main
from mmpeft.errors import RefusedError
from mmpeft.inference.explain import explain
from mmpeft.inference.requests import Completion
from mmpeft.runs.manifest import read_manifest

gradio = pytest.importorskip("gradio")
client = pytest.importorskip("gradio_client")

from mmpeft.demo import asked as asking_module  # noqa: E402
from mmpeft.demo.about import about_run  # noqa: E402
from mmpeft.demo.asked import Upload  # noqa: E402
from mmpeft.demo.page import build  # noqa: E402
from mmpeft.demo.source import truth_of  # noqa: E402
from tests.demo.conftest import asking  # noqa: E402

QUESTION = "what color is it?"
COLOURS = ["red", "blue", "green"]
SCRIPT = "<script>alert(1)</script><img src=x onerror=alert(2)> [x](javascript:alert(3)) $\\href{x}{y}$ ${1+1} {{x}}"


@pytest.fixture(scope="module")
def vlm(tiny_run):
    """The same run, asked without a page."""
    return mmpeft.load(str(tiny_run), "cpu")


@pytest.fixture
def writes(source, monkeypatch):
    """Has every finetune answer with a text."""

    def answer(text: str) -> None:
        def submit(request, *, on_event):
            on_event(Completion(text))
            return type("Ticket", (), {"cancel": lambda self: None})()

        monkeypatch.setattr(source.live, "submit", submit)

    return answer


def test_question_and_caption(ask, vlm, red):
    (answer,) = ask(red)
    assert answer["text"] == vlm.ask(red, QUESTION, "default")
    assert (answer["finetune"], answer["ranking"], answer["error"]) == ("default", [], None)
    assert answer["seconds"] > 0
    assert ask(red, finetunes=["base"])[0]["text"] == vlm.ask(red, QUESTION, "base")
    assert ask(red, task="Caption", question="")[0]["text"] == vlm.caption(red)
    assert ask(question="is red a color?")[0]["text"] == vlm.ask(None, "is red a color?")


def test_finetunes_answer_side_by_side_in_one_batch(ask, source, vlm, red):
    before = source.live.statistics()
    answers = ask(red, finetunes=["base", "default"])
    after = source.live.statistics()
    assert [(own["finetune"], own["text"]) for own in answers] == [
        (name, vlm.ask(red, QUESTION, name)) for name in ("base", "default")
    ]
    steps, tokens = (after[name] - before[name] for name in ("steps", "tokens"))
    assert steps < 0.75 * tokens  # one after the other, a step would be a token


def test_answers_are_shown_as_they_are_written(page, vlm, red, monkeypatch):
    monkeypatch.setattr(asking_module, "PAUSE", 0.0)
    job = page.submit(*asking(red, finetunes=["base"]), api_name="/answer")
    job.result()
    pieces = [answers[0]["text"] for answers, *_ in job.outputs()]
    assert pieces[-1] == vlm.ask(red, QUESTION, "base")
    assert len({*pieces}) > 3
    assert all(later.startswith(earlier) for earlier, later in pairwise(pieces))


def test_several_images_go_into_one_question(ask, vlm, red, blue):
    for order in ((red, blue), (blue, red)):
        assert ask(*order)[0]["text"] == vlm.ask(order, QUESTION)
    marked = "<image> or <image>, which is red?"
    assert ask(red, blue, question=marked)[0]["text"] == vlm.ask((red, blue), marked)


def test_typed_choices_are_ranked_and_drawn(page, vlm, red):
    answers, board, *_ = page.predict(*asking(red, choices="red, blue,green"), api_name="/answer")
    expected = vlm.rank(red, QUESTION, COLOURS)
    assert answers[0]["text"] == expected[0][0]
    assert [choice for choice, _ in answers[0]["ranking"]] == [choice for choice, _ in expected]
    assert [score for _, score in answers[0]["ranking"]] == pytest.approx(
        [score for _, score in expected], abs=1e-5
    )
    assert board.count('class="bar"') == 3


def test_without_typed_choices_the_runs_own_are_ranked(ask, source, vlm, red, monkeypatch):
    monkeypatch.setattr(source.vlm.manifest, "choices", {"default": {"vqa": {"": COLOURS}}})
    own, base = ask(red, finetunes=["default", "base"])
    assert own["text"] == vlm.rank(red, QUESTION, COLOURS)[0][0]
    assert len(own["ranking"]) == 3
    assert own["remarks"][0].startswith("default chose among the answers that its training data listed")
    assert base["ranking"] == []


def test_a_conversation_remembers_what_each_answered(ask, vlm, red, blue):
    both = ["default", "base"]
    first = {own["finetune"]: own["text"] for own in ask(red, finetunes=both)}
    follow = "and is it blue?"
    alone = ask(red, question=follow, finetunes=both)
    assert [own["text"] for own in alone] == vlm.ask(red, follow, both)
    history = {name: [(QUESTION, first[name])] for name in both}
    for name, own in zip(both, alone, strict=True):
        history[name].append((follow, own["text"]))
    for own in ask(red, question="sure?", finetunes=both, remember=True):
        name = own["finetune"]
        assert own["text"] == vlm.ask(red, "sure?", name, history=history[name])
        assert own["text"] != vlm.ask(red, "sure?", name)
    assert ask(blue, remember=True)[0]["text"] == vlm.ask(blue, QUESTION)  # other images: a new conversation


def test_a_caption_is_remembered_by_its_instruction(ask, vlm, red):
    caption = ask(red, task="Caption", question="")[0]["text"]
    history = [(vlm.caption_instruction, caption)]
    assert ask(red, remember=True)[0]["text"] == vlm.ask(red, QUESTION, history=history)


def test_who_answered_less_of_a_conversation_says_so(ask, vlm, red):
    told = ask(red, finetunes=["default"])[0]["text"]
    own, base = ask(red, finetunes=["default", "base"], remember=True, question="sure?")
    assert not [remark for remark in own["remarks"] if "turns" in remark]
    assert "reads 0 of the 1 earlier turns: those that it answered" in base["remarks"]
    assert own["text"] == vlm.ask(red, "sure?", history=[(QUESTION, told)])
    assert base["text"] == vlm.ask(red, "sure?", "base")


def test_heat_maps_are_of_the_prompt_that_was_answered(ask, vlm, red, blue):
    both = ["default", "base"]
    plain = ask(red, blue, finetunes=both)
    asked = ask(red, blue, finetunes=both, heat_map=True)
    assert [own["text"] for own in asked] == [own["text"] for own in plain]
    assert [own["heat_maps"] for own in plain] == [[], []]
    for own in asked:
        assert len(own["heat_maps"]) == 2
        explained = vlm.explain((red, blue), QUESTION, own["finetune"], deletions=0)
        assert explained.answer == own["text"]
        for number, url in enumerate(own["heat_maps"]):
            assert same(url, explained.overlay(number=number, side=480))
            assert not same(url, explained.overlay(number=1 - number, side=480))
    follow = ask(red, blue, question="sure?", finetunes=["default"], remember=True, heat_map=True)[0]
    history = [(QUESTION, own["text"]) for own in (plain[0], asked[0])]
    (request,), _ = vlm.requests((red, blue), "sure?", "default", history=history)
    ends = not any(remark.startswith("cut after") for remark in follow["remarks"])
    explained = explain(vlm.engine, request, follow["text"], 0, ends)
    assert same(follow["heat_maps"][0], explained.overlay(side=480))


def test_a_heat_map_costs_the_engine_a_forward_and_no_more(ask, source, red, monkeypatch):
    model, between, forwards = source.vlm.model.language_model, source.live.between_steps, []
    first = model.get_submodule(find_layers(model)[0])

    def counted(action):
        def run():
            hook = first.register_forward_hook(lambda *_: forwards.append(1))
            try:
                return action()
            finally:
                hook.remove()

        return between(run)

    monkeypatch.setattr(source.live, "between_steps", counted)
    (answer,) = ask(red, finetunes=["base"], heat_map=True)
    assert len(answer["heat_maps"]) == len(forwards) == 1


def same(url: str, picture: Image.Image) -> bool:
    """Whether a data URL shows a picture, but for what JPEG loses."""
    shown = Image.open(BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")
    return shown.size == picture.size and max(ImageStat.Stat(ImageChops.difference(shown, picture)).mean) < 2


def test_where_there_is_no_heat_map_it_says_why(ask):
    (answer,) = ask(question="is red a color?", heat_map=True)
    assert (
        "no heat map: the question has no image, and heat maps lie on one; give an image" in answer["remarks"]
    )


def test_what_an_answer_does_not_say_of_itself_is_told(ask, vlm, red):
    assert not [remark for remark in ask(red)[0]["remarks"] if "cut" not in remark]
    for changes in ({}, {"choices": "red,blue"}, {"finetunes": ["base"]}):
        assert "no image: asked about text alone" in ask(**changes)[0]["remarks"]
    tokens = vlm.sampling().max_new_tokens
    completion = vlm.answer(vlm.requests(red, QUESTION, "base")[0])[0]
    cut = (
        f"cut after {tokens} tokens, the longest that an answer may have"
        in ask(red, finetunes=["base"])[0]["remarks"]
    )
    assert cut == (completion.finish_reason == "length")


def test_an_answer_without_a_word_is_no_empty_card(ask, writes, red):
    writes("")
    assert ask(red, finetunes=["base"])[0]["remarks"] == [
        "the base ended its answer at once: it wrote nothing"
    ]


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b"<svg onload=alert(1)>", "x.png", "x.png: found an SVG drawing"),
        (b"<svg onload=alert(1)>", "x.svg", "x.svg: found an SVG drawing"),
        (b"", "nothing.png", "nothing.png.*empty"),
        (None, "cut.png", "cut.png: cannot be decoded"),
    ],
)
def test_an_unreadable_file_is_named(ask, red, tmp_path, content, name, message):
    path = tmp_path / name
    path.write_bytes(red.read_bytes()[:60] if content is None else content)
    with pytest.raises(client.exceptions.AppError, match=message) as raised:
        ask(red, path)
    assert "<svg" not in str(raised.value)
    assert "gradio" not in str(raised.value)


def test_an_unreadable_file_is_left_out_and_named_as_soon_as_it_is_there(source, red, tmp_path, monkeypatch):
    (tmp_path / "cut.png").write_bytes(red.read_bytes()[:60])
    check = next(own.fn for own in build(source).fns.values() if own.name == "check")
    told: list[str] = []
    monkeypatch.setattr(gradio, "Warning", lambda message, **_: told.append(message))
    good, bad = Upload(str(red), "mine.png"), Upload(str(tmp_path / "cut.png"), "<b>cut.png")
    assert check([good, bad]) == [good]
    assert len(told) == 1
    assert told[0].startswith("left out: &lt;b&gt;cut.png: cannot be decoded")
    assert check([good]) == [good]
    assert len(told) == 1


def test_too_many_pixels(ask, tmp_path):
    Image.new("1", (13_000, 10_000)).save(tmp_path / "large.png")
    with pytest.raises(client.exceptions.AppError, match=r"large.png.*128,000,000 pixels"):
        ask(tmp_path / "large.png")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"finetunes": ["nobody"]}, "nobody"),
        ({"finetunes": []}, "choose 1 to 8 finetunes to answer; 0 are chosen"),
        ({"task": "Delete"}, "Delete"),
        ({"question": " "}, "type a question"),
        ({"question": "x" * 2001}, "type a question of 1 to 2000"),
        ({"choices": "red"}, "choices must be at least two"),
        ({"choices": "<b>, <b>"}, "two different, non-empty answers; got .'&lt;b&gt;'"),
        ({"choices": "x," * 1001}, "type choices of 1 to 2000"),
    ],
)
def test_refusals(ask, red, changes, message):
    with pytest.raises(client.exceptions.AppError, match=message):
        ask(red, **changes)


def test_what_one_finetune_refuses_is_its_own_error(ask, source, vlm, red, monkeypatch):
    assert "2 <image> but 1 images" in ask(red, question="<image> and <image>?")[0]["error"]
    submit = source.live.submit

    def refusing(request, **how):
        if request.adapter == "default":
            raise RefusedError("no place")
        return submit(request, **how)

    monkeypatch.setattr(source.live, "submit", refusing)
    own, base = ask(red, finetunes=["default", "base"])
    assert (own["text"], own["error"]) == ("", "no place")
    assert (base["text"], base["error"]) == (vlm.ask(red, QUESTION, "base"), None)


def test_a_caption_needs_an_image(ask):
    with pytest.raises(client.exceptions.AppError, match="a caption needs an image"):
        ask(task="Caption")


def test_an_uploaded_file_too_large_is_refused(ask, tmp_path):
    (tmp_path / "large.png").write_bytes(b"\x89PNG" + bytes(21 * 2**20))
    with pytest.raises(Exception, match=r"413|too large|exceeds"):
        ask(tmp_path / "large.png")


def raw(page, image: dict, *rest) -> str:
    """What the page says to a request that no client of gradio's has touched: they would upload the file first."""
    import httpx

    body = {"data": [[{"image": image, "caption": None}], *rest]}
    begun = httpx.post(f"{page.src}gradio_api/call/answer", json=body).json()
    return httpx.get(f"{page.src}gradio_api/call/answer/{begun['event_id']}", timeout=60).text


def test_files_of_the_server_stay_there(page, vlm, red, tiny_run):
    import httpx

    _, *rest = asking(question=QUESTION)
    (uploaded,) = httpx.post(
        f"{page.src}gradio_api/upload", files={"files": ("red.png", red.read_bytes())}
    ).json()
    assert (
        vlm.ask(red, QUESTION)
        in json.loads(raw(page, {"path": uploaded}, *rest).split("data: ")[-1])[0][0]["text"]
    )
    for path in ("/etc/passwd", str(red), str(tiny_run / "report.png")):
        assert httpx.get(f"{page.src}gradio_api/file={path}").status_code in (403, 404)
        told = raw(page, {"path": path, "meta": {"_type": "gradio.FileData"}}, *rest)
        assert "event: error" in told
        assert "event: complete" not in told
        assert Path(path).name not in told


def test_markup_stays_text(page, writes, red):
    writes(SCRIPT)
    asked = asking(red, question=f"{SCRIPT}?", choices="")
    answers, board, python, _ = page.predict(*asked, api_name="/answer")
    assert answers[0]["text"] == SCRIPT
    assert "&lt;script&gt;" in board
    assert not any(mark in board for mark in ("<script", "<img", "${", "{{"))
    compile(python, "copied", "exec")


def test_names_and_facts_of_a_run_are_escaped(source, monkeypatch):
    monkeypatch.setattr(source, "told", SCRIPT)
    monkeypatch.setattr(source.about[0], "facts", {SCRIPT: SCRIPT})
    parts = build(source).get_config_file()["components"]
    texts = [part["props"]["value"] for part in parts if part["type"] == "html"]
    assert sum("&lt;script" in text for text in texts) == 2
    assert not any("<script" in text or "<img" in text or "${" in text for text in texts)


def test_the_page_tells_of_the_run(source, tiny_run):
    about = about_run(tiny_run)
    assert read_manifest(tiny_run).facts.items() <= about.facts.items()
    assert about.pictures[0][0] == "report"
    assert about.card.startswith("#")
    assert "![" not in about.card
    assert "library_name" not in about.card
    parts = build(source).get_config_file()["components"]
    assert about.card in [part["props"].get("value") for part in parts if part["type"] == "markdown"]


def test_a_click_on_an_example_fills_the_page(source):
    choose = next(own.fn for own in build(source).fns.values() if own.name == "choose")
    event = type("Event", (), {"index": 1})()
    own = source.examples[1]
    assert choose(event) == (own.images, own.task, own.question, "")
    assert own.truth


def test_the_truth_of_an_example_is_told_of_no_other_question(source, tiny_run):
    own = source.examples[1]
    name = own.images[0].name
    assert Path(name).parent == tiny_run / "examples"
    shown = Upload(name, name), Upload(name, "red0.png")

    def told(images, question, task="Question"):
        asked = asking_module.asked_by(images, task, question, ["default"], None, None)
        return truth_of(source.examples, asked)

    assert told([shown[0]], own.question) == own.truth
    assert told([shown[0]], "and the shape?") is None
    assert told([shown[0]], own.question, "Caption") is None
    assert told([shown[1]], own.question) is None
    assert told([shown[0], shown[0]], own.question) is None
    assert told([], own.question) is None


def test_the_code_of_an_example_names_its_file(source, vlm, capsys):
    own = source.examples[1]
    uploads = [Upload(each.name, each.name) for each in own.images]
    asked = asking_module.asked_by(uploads, own.task, own.question, ["default"], None, None)
    answers = [*source.ask(asked)][-1]
    python, _ = source.code(asked, answers)
    exec(compile(python, "copied", "exec"), {})
    assert capsys.readouterr().out.endswith(f"{vlm.ask(own.images[0].name, own.question)}\n")


def test_only_the_answer_is_public(page):
    assert list(page.view_api(return_format="dict")["named_endpoints"]) == ["/answer"]


def test_without_a_run(tmp_path):
    with pytest.raises(SystemExit, match=r"error: .*`make quickstart`"):
        main(["demo", "--run", str(tmp_path / "none"), "--share", "--port", "0"])


@pytest.mark.parametrize(
    ("host", "share", "warned"), [("127.0.0.1", False, False), ("0.0.0.0", False, True), ("::1", True, True)]
)
def test_a_page_for_others_warns(tiny_run, monkeypatch, capsys, host, share, warned):
    monkeypatch.setattr(gradio.Blocks, "launch", lambda self, **settings: print(settings))
    main(["demo", "--run", str(tiny_run), "--host", host, "--port=0", *(["--share"] if share else [])])
    out, err = capsys.readouterr()
    assert ("no login" in err) == warned
    assert f"'server_name': '{host}'" in out
    assert f"'share': {share}" in out
    assert "'max_file_size': '200mb'" in out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--port", "70000"], "port 70000 is none; name one below 65536"),
        (["--port", "-1"], "port -1 is none"),
        (
            ["--host", "256.1.1.1"],
            r"nothing can listen at 256\.1\.1\.1, port 7860 \(.*name an address of this machine",
        ),
    ],
)
def test_where_nobody_can_listen_is_told_before_a_model_is_loaded(tiny_run, monkeypatch, words, told):
    monkeypatch.setattr("mmpeft.demo.launch.OfRuns", None)
    with pytest.raises(SystemExit, match=f"error: {told}"):
        main(["demo", "--run", str(tiny_run), *words])
    monkeypatch.setattr("mmpeft.serving.server.load", None)
    with pytest.raises(SystemExit, match=f"error: {told}" if "--port" in words else "no keys"):
        main(["serve", "--run", str(tiny_run), *words])


def test_a_port_that_is_taken_is_told(tiny_run, address, monkeypatch):
    monkeypatch.setattr("mmpeft.demo.launch.OfRuns", None)
    port = address.rstrip("/").rpartition(":")[2]
    with pytest.raises(
        SystemExit, match=rf"error: port {port} of 127.0.0.1 is taken; name another with --port"
    ):
        main(["demo", "--run", str(tiny_run), "--port", port])


def test_without_the_extra_it_says_which(tiny_run, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("mmpeft.demo")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit, match=r"error: gradio is missing, .*pip install 'mmpeft\[demo\]'"):
        main(["demo", "--run", str(tiny_run)])

"""Videos on the demo's page: asked about by their frames as from Python, or refused by their names."""

import base64
import re
import shutil
import sys
from io import BytesIO

import pytest
from PIL import Image, ImageChops, ImageStat

import mmpeft
from mmpeft.errors import RefusedError
from tests.data.layouts.writing import clip as clip_of
from tests.demo.conftest import opened

gradio = pytest.importorskip("gradio")
client = pytest.importorskip("gradio_client")

from mmpeft.demo.asked import Answer, Asked, Upload  # noqa: E402
from mmpeft.demo.board import board  # noqa: E402
from mmpeft.demo.of_server import OfServer  # noqa: E402
from mmpeft.demo.page import build  # noqa: E402
from mmpeft.demo.uploads import Shown  # noqa: E402

QUESTION = "what color is it?"


@pytest.fixture(scope="module")
def vlm(tiny_run):
    return mmpeft.load(str(tiny_run), "cpu")


@pytest.fixture
def short(tmp_path):
    """A video of three frames."""
    pytest.importorskip("av")
    (tmp_path / "short.mp4").write_bytes(clip_of(3))
    return tmp_path / "short.mp4"


def asked_of(source, monkeypatch):
    """The requests that the page makes, as its model reads them, with the images themselves."""
    found, submit = [], source.live.submit

    def keeping(request, **how):
        encoded = source.vlm.engine.encode(request)
        pixels = [
            source.vlm.engine.features.encoding.decode(own).tobytes() for own in request.record["images"]
        ]
        found.append((encoded.ids, pixels))
        return submit(request, **how)

    monkeypatch.setattr(source.live, "submit", keeping)
    return found


@pytest.mark.parametrize(
    ("question", "order"),
    [
        (QUESTION, ["clip"]),
        (QUESTION, ["red", "clip", "short"]),
        ("is <video> like <image> or like <video>?", ["clip", "short", "red"]),
    ],
)
def test_a_video_is_asked_about_as_from_python(
    ask, source, vlm, clip, short, red, monkeypatch, question, order
):
    files = {"clip": clip, "short": short, "red": red}
    found = asked_of(source, monkeypatch)
    (answer,) = ask(*(files[name] for name in order), question=question)
    about = tuple(files[name] if name == "red" else mmpeft.Video(files[name]) for name in order)
    assert answer["text"] == vlm.ask(about, question)
    assert answer["error"] is None
    (request,), _ = vlm.requests(about, question, task=vlm.manifest.default_task)
    pixels = [vlm.engine.features.encoding.decode(own).tobytes() for own in request.record["images"]]
    ((ids, shown),) = found
    assert ids == vlm.engine.encode(request).ids
    assert shown == pixels
    assert len(pixels) == sum({"clip": 8, "short": 3, "red": 1}[name] for name in order)


def test_captions_choices_and_conversations_are_of_videos_too(ask, vlm, clip):
    video = mmpeft.Video(clip)
    assert ask(clip, task="Caption", question="")[0]["text"] == vlm.caption(video)
    (best,) = ask(clip, choices="red, blue")
    assert best["text"] == vlm.rank(video, QUESTION, ["red", "blue"])[0][0]
    (later,) = ask(clip, question="sure?", remember=True)
    history = [(vlm.caption_instruction, vlm.caption(video)), (QUESTION, best["text"])]
    assert later["text"] == vlm.ask(video, "sure?", history=history)
    told = "<video> may stand in the first question of a conversation alone"
    assert told in ask(clip, question="<video>?", remember=True)[0]["error"]


def test_so_many_frames_are_read_as_the_page_says_and_other_frames_are_another_conversation(
    page, ask, vlm, clip
):
    from tests.demo.conftest import asking

    answers, _, python, _ = page.predict(*asking(clip, frames=3), api_name="/answer")
    assert answers[0]["text"] == vlm.ask(mmpeft.Video(clip, frames=3), QUESTION)
    assert "mmpeft.Video('my clip.mp4', frames=3)" in python
    (again,) = ask(clip, question="sure?", remember=True, frames=4)
    assert again["text"] == vlm.ask(mmpeft.Video(clip, frames=4), "sure?")


def test_a_heat_map_lies_on_every_frame_and_says_when_it_is_shown(page, ask, vlm, short, red):
    (answer,) = ask(short, red, heat_map=True)
    assert answer["heat_map_titles"] == [
        "short.mp4, 0.0 seconds", "short.mp4, 0.1 seconds", "short.mp4, 0.2 seconds", "",
    ]  # fmt: skip
    explained = vlm.explain((mmpeft.Video(short), red), QUESTION, deletions=0)
    assert explained.answer == answer["text"]
    for number, url in enumerate(answer["heat_maps"]):
        own = Image.open(BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")
        off = ImageChops.difference(own, explained.overlay(number=number, side=480))
        assert max(ImageStat.Stat(off).mean) < 2
    shown = board(
        [type("Turn", (), {"question": "?", "truth": None, "answers": [Answer(**answer, done=True)]})]
    )
    assert shown.count("<figure>") == 4
    assert "<figcaption>short.mp4, 0.2 seconds</figcaption>" in shown


def test_the_code_asks_the_same_and_a_server_is_not_asked(page, vlm, clip, red, monkeypatch, capsys):
    from tests.demo.conftest import asking

    answers, _, python, curl = page.predict(*asking(clip, red), api_name="/answer")
    assert "(mmpeft.Video('my clip.mp4'), 'red0.png')" in python
    assert "curl http" not in curl
    assert "# a server is sent images alone; about a video it is asked from Python" in curl
    monkeypatch.chdir(clip.parent)
    code = python.replace("'red0.png'", repr(str(red)))
    exec(compile(code, "copied", "exec"))
    assert capsys.readouterr().out == f"{answers[0]['text']}\n"


def test_what_is_no_video_is_left_out_and_named(source, clip, tmp_path, monkeypatch):
    check = next(own.fn for own in build(source).fns.values() if own.name == "check")
    told: list[str] = []
    monkeypatch.setattr(gradio, "Warning", lambda message, **_: told.append(message))
    (tmp_path / "cut.mp4").write_bytes(clip.read_bytes()[:400])
    (tmp_path / "text.mp4").write_text("no video at all")
    data = bytearray(clip.read_bytes())
    middle = data.index(b"mdat") + 60
    data[middle : middle + 40] = bytes(40)
    (tmp_path / "torn.mp4").write_bytes(data)
    names = ("cut.mp4", "text.mp4", "torn.mp4", "gone.mp4")
    bad = [Upload(str(tmp_path / name), f"my {name}") for name in names]
    good = Upload(str(clip), "mine.mp4")
    assert check([*bad, good]) == [good]
    assert [line.partition(".mp4")[0] for line in told] == [
        "left out: my cut",
        "left out: my text",
        "left out: my torn",
        "left out: my gone",
    ]
    assert re.match(r"left out: my torn.mp4, 0.\d seconds: ", told[2])
    assert not any(str(tmp_path) in line for line in told)


def test_without_the_extra_it_says_which(source, clip, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    shutil.copy(clip, tmp_path / "other.mp4")
    with pytest.raises(
        RefusedError, match=r"mine.mp4: found video, .* pip install 'mmpeft\[video\]'"
    ) as told:
        source.check(Upload(str(tmp_path / "other.mp4"), "mine.mp4"))
    assert str(tmp_path) not in str(told.value)


def test_an_image_as_large_as_a_video_may_be_is_refused(source, tmp_path):
    (tmp_path / "large.png").write_bytes(b"\x89PNG" + bytes(21 * 2**20))
    with pytest.raises(RefusedError, match=r"big.png is too large: 21 MiB; an image may have 20"):
        Shown([Upload(str(tmp_path / "large.png"), "big.png")], source.vlm.manifest.image_config)


def test_a_server_is_not_asked_about_videos(clip, red):
    server = type("Server", (), {"url": "http://none", "api_key": None, "models": lambda self: ["base"]})()
    source = OfServer(server)
    told = r"my clip.mp4 is a video, and a server is sent images alone; .*mmpeft demo --run"
    video = Upload(str(clip), "my clip.mp4")
    with pytest.raises(RefusedError, match=told):
        source.check(video)
    with pytest.raises(RefusedError, match=told):
        next(source.ask(Asked([Upload(str(red), "red.png"), video], "Question", QUESTION, ["base"])))
    source.check(Upload(str(red), "red.png"))
    with opened(source) as url:
        assert client.Client(url, verbose=False).view_api(return_format="dict")

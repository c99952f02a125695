"""Videos and several images in one question: asked as they are trained on, from Python and the command line."""

import sys

import pytest

import mmpeft
from mmpeft.cli import main
from mmpeft.data.sources import load_records
from mmpeft.errors import RefusedError
from mmpeft.inference.requests import Request
from tests.data.layouts.writing import clip
from tests.tiny import write_jsonl

QUESTION = "what color is it?"


@pytest.fixture
def video(tmp_path):
    pytest.importorskip("av")
    path = tmp_path / "clip.mp4"
    path.write_bytes(clip())
    return str(path)


def read(vlm, *asked):
    """What the model reads of a question."""
    (request,), _ = vlm.requests(*asked, task="vqa")
    encoded = vlm.engine.encode(request)
    return encoded.ids, encoded.images


@pytest.mark.parametrize(
    ("question", "image"),
    [(QUESTION, False), ("what is in <video>?", False), ("is <image> in <video>?", True)],
)
def test_a_question_about_a_video_is_read_as_its_row_is(vlm, images, video, tmp_path, question, image):
    row = {"video": video, "frames": 3, "question": question} | ({"image": images[0]} if image else {})
    (record,) = load_records(
        write_jsonl(tmp_path / "rows.jsonl", [row]), task="vqa", require_answers=False, image_root="/"
    )
    wanted = vlm.engine.encode(Request(record))
    about = mmpeft.Video(video, frames=3)
    assert read(vlm, (images[0], about) if image else about, question) == (wanted.ids, wanted.images)
    without = vlm.engine.encode(Request({key: own for key, own in record.items() if key != "times"}))
    assert len(without.ids) < len(wanted.ids), "the times are read"


def test_what_is_not_marked_comes_first_in_the_order_given(vlm, images, video):
    frames = mmpeft.Video(video, fps=4)
    assert [name.rpartition("=")[2] for name in frames.names] == ["0", "3", "6", "9"]
    named = tuple(frames.names)
    assert read(vlm, (images[0], frames), QUESTION) == read(vlm, (images[0], *named), QUESTION)
    assert read(vlm, (frames, images[0]), QUESTION) == read(vlm, (*named, images[0]), QUESTION)
    assert read(vlm, (frames, images[0]), QUESTION) != read(vlm, (images[0], frames), QUESTION)
    one = vlm.caption(frames, max_new_tokens=4)
    assert vlm.caption([frames, images[0]], max_new_tokens=4)[0] == one


@pytest.mark.parametrize(
    ("question", "told"),
    [
        ("<video> or <video>?", "has 0 <image> and 2 <video> but 1 images and 1 videos were given"),
        ("what is in <video>?", "has 0 <image> and 1 <video> but 1 images"),
        ("what is in <image>?", "has 1 <image> but 1 images and 1 videos were given"),
    ],
)
def test_there_is_a_marker_for_each_or_none(vlm, images, video, question, told):
    with pytest.raises(RefusedError, match=f"the question {told}"):
        vlm.ask((images[0], mmpeft.Video(video)), question)


def test_a_later_question_has_no_marker_of_a_video(vlm, images, video):
    told = "<video> may stand in the first question of a conversation alone"
    for history, question in (
        ([("what is in <video>?", "red")], "and in <video>?"),
        ([(QUESTION, "red"), ("<video>?", "blue")], QUESTION),
    ):
        with pytest.raises(RefusedError, match=told):
            vlm.requests(mmpeft.Video(video), question, history=history)
        vlm.requests(images[0], question, history=history)  # without a video it is text
    vlm.requests(mmpeft.Video(video), QUESTION, history=[("what is in <video>?", "a <video>")])


def test_the_command_line_asks_about_several(tiny_run, images, video, capsys):
    plain = mmpeft.load(str(tiny_run), "cpu")
    words = ["ask", QUESTION, "--run", str(tiny_run), "--max_new_tokens", "6"]
    for more, about in [
        (["--image", images[0], "--image", images[4]], (images[0], images[4])),
        (["--video", video, "--frames", "2"], mmpeft.Video(video, 2)),
        (["--image", images[0], f"--video={video}"], (mmpeft.Video(video), images[0])),
        (["--video", video, "--fps", "3", "--video", video], (mmpeft.Video(video, fps=3),) * 2),
    ]:
        main([*words, *more])
        assert capsys.readouterr().out == plain.ask(about, QUESTION, max_new_tokens=6) + "\n", more


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--frames", "3"], "--frames and --fps are of a --video, and none is named"),
        (["--video", "VIDEO", "--frames", "0"], "--frames is 0; it must be at least 1"),
        (["--video", "VIDEO", "--fps", "0"], "fps is 0.0; wanted frames of a second, above 0"),
        (["--video", "gone.mp4"], "'gone.mp4' does not exist"),
        (["--video", "IMAGE"], r"\.png': no video that is known"),
        (["--video", "EMPTY"], r"empty\.mp4': no video that is known"),
        (["--image", "VIDEO"], r"clip\.mp4': a video; name a frame"),
        (
            ["--video", "VIDEO", "--server", "http://127.0.0.1:9", "--run", "runs/quickstart"],
            "--server is sent images",
        ),
    ],
)
def test_what_cannot_be_seen_is_refused_before_anything_is_loaded(
    tiny_run, images, video, tmp_path, monkeypatch, more, told
):
    monkeypatch.setattr("mmpeft.inference.vlm.load_run", None)
    (tmp_path / "empty.mp4").touch()
    files = {"VIDEO": video, "IMAGE": images[0], "EMPTY": str(tmp_path / "empty.mp4")}
    run = [] if "--run" in more else ["--run", str(tiny_run)]
    with pytest.raises(SystemExit, match=told):
        main(["ask", QUESTION, *run, *(files.get(word, word) for word in more)])


def test_without_a_decoder_the_extra_is_named(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "clip.mp4").write_bytes(b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41" + bytes(64))
    with pytest.raises(SystemExit, match=r"clip\.mp4.*pip install 'mmpeft\[video\]'"):
        main(["ask", QUESTION, "--run", str(tiny_run), "--video", str(tmp_path / "clip.mp4")])

"""Videos in rows: what is said of frames that nobody asked for, and where PyAV is not installed."""

import sys

import pytest
from PIL import Image

from mmpeft.data.images import image_key, load_image
from mmpeft.data.layouts.notes import Notes
from mmpeft.data.packing import pack
from mmpeft.data.sources import DataError, load_records
from mmpeft.data.template import Template
from mmpeft.training.checkpoint import hash_records
from tests.data.layouts.writing import clip
from tests.tiny import write_jsonl

ROW = {"video": "clip.mp4", "question": "what?", "answer": "grey"}


@pytest.fixture
def image(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    return "a.png"


def test_frames_that_no_row_asked_for_are_told_once_and_are_those_of_the_video(tmp_path):
    pytest.importorskip("av")
    (tmp_path / "clip.mp4").write_bytes(clip())
    notes = Notes()
    records = load_records(write_jsonl(tmp_path / "a.jsonl", [ROW, ROW, {**ROW, "frames": "2"}]), notes=notes)
    assert [line for line in notes.lines() if "video" in line] == [
        "2 videos whose rows do not say frames: 8 of each"
    ]
    first, last = (load_image(name).getpixel((16, 16)) for name in records[2]["images"])
    assert isinstance(first, tuple)
    assert isinstance(last, tuple)
    assert first[0] < 20
    assert last[0] > 180, "the first and the last of frames that grow lighter"


def test_a_frame_has_its_time_also_where_it_is_named_itself(tmp_path, image):
    """The clip has twelve frames a second."""
    pytest.importorskip("av")
    (tmp_path / "clip.mp4").write_bytes(clip())
    rows = [
        {**ROW, "frames": 3},
        {"image": [image, "clip.mp4#frame=6"], "question": "what?", "answer": "grey"},
        {"video": "clip.mp4", "frames": 1, "image": image, "question": "Like <image>?", "answer": "no"},
        {"image": image, "question": "what?", "answer": "grey"},
    ]
    records = load_records(write_jsonl(tmp_path / "a.jsonl", rows))
    times = [record.get("times") for record in records]
    assert times[:3] == [
        [0, pytest.approx(5 / 12), pytest.approx(11 / 12)],
        [None, 0.5],
        [pytest.approx(5 / 12), None],
    ]
    assert "times" not in records[3]


def test_the_same_frames_are_another_prompt_with_other_times(tmp_path, tiny_tokenizer):
    """As of a video that was saved again at another speed; what is resumed or tested must notice."""
    pytest.importorskip("av")
    (tmp_path / "clip.mp4").write_bytes(clip())
    asked = [{**ROW, "frames": 2}, {**ROW, "frames": 2, "question": "why?"}]
    records = load_records(write_jsonl(tmp_path / "a.jsonl", asked))
    slower = [record | {"times": [0.0, 30.0]} for record in records]
    assert hash_records(records, image_key) != hash_records(slower, image_key)
    template = Template(tiny_tokenizer, 2)
    first, second, late = (template.encode(record) for record in (*records, slower[1]))
    shared = pack([first, second]).segments.count(0)
    assert shared > first.ids.index(-1) + 4, "two questions about a video share its frames"
    assert pack([first, late]).segments.count(0) < shared, "but not with one of other times"


@pytest.mark.parametrize("frames", [0, -1, True, 2.5, "many", [1]])
def test_frames_are_a_number(tmp_path, frames):
    data = write_jsonl(tmp_path / "a.jsonl", [{**ROW, "frames": frames}])
    with pytest.raises(DataError, match=r"a\.jsonl:1: frames is .*; wanted how many frames"):
        load_records(data)


def test_without_pyav_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "clip.mp4").write_bytes(b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41" + bytes(64))
    with pytest.raises(DataError, match=r"a\.jsonl:1: video: .*clip\.mp4.*pip install 'mmpeft\[video\]'"):
        load_records(write_jsonl(tmp_path / "a.jsonl", [ROW]))

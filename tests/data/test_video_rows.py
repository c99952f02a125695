"""Videos in rows: what is said of frames that nobody asked for, and where PyAV is not installed."""

import sys

import pytest

from mmpeft.data.images import load_image
from mmpeft.data.layouts.notes import Notes
from mmpeft.data.sources import DataError, load_records
from tests.data.layouts.writing import clip
from tests.tiny import write_jsonl

ROW = {"video": "clip.mp4", "question": "what?", "answer": "grey"}


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

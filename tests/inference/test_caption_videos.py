"""Videos in `mmpeft caption`: a row each, whose settings are of the run, and whose faults are its own."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

import mmpeft
from mmpeft.cli import main
from mmpeft.data.image_lists import find_images
from mmpeft.data.images import ImageConfig, image_key
from mmpeft.data.video import sample_frames
from mmpeft.errors import RefusedError
from mmpeft.inference import captioning
from mmpeft.inference.captioning import Task
from mmpeft.inference.captioning.content import content_digits
from tests.data.layouts.writing import clip

BROKEN = b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41" + bytes(64)


@pytest.fixture
def folder(tmp_path, tiny_data) -> Path:
    """Two images, two videos (one without an ending), one that is damaged, and a text."""
    pytest.importorskip("av")
    folder = tmp_path / "media"
    folder.mkdir()
    for name in ("red0.png", "blue0.png"):
        shutil.copy(tiny_data / "images" / name, folder / name)
    (folder / "clip.MP4").write_bytes(clip())
    (folder / "film").write_bytes(clip(20))
    (folder / "gone.mov").write_bytes(BROKEN)
    (folder / "notes.txt").write_text("text")
    return folder


def caption(folder, run, output, **task) -> list[dict]:
    captioning.caption([str(folder)], str(run), str(output), Task(batch_size=4, **task), workers=1)
    file = output if output.suffix else output / "captions.jsonl"
    return [json.loads(line) for line in file.read_bytes().splitlines()]


def test_either_marker_is_where_the_image_or_the_frames_stand(folder, tiny_run, tmp_path):
    either = [
        caption(folder, tiny_run, tmp_path / f"{kind}.jsonl", question=[f"what is in <{kind}>?"])
        for kind in ("image", "video")
    ]
    answers = [[row.get("answer") for row in rows] for rows in either]
    assert answers[0] == answers[1]
    assert len({*answers[0]}) > 2
    for question in ("<image> or <image>?", "<image> in <video>?"):
        with pytest.raises(RefusedError, match="has 2 of <image> and <video>, and is asked about one image"):
            Task(question=[question])


def test_a_video_is_a_row_and_its_frames_are_one_prompt(folder, tiny_run, tmp_path, capsys):
    found = caption(folder, tiny_run, tmp_path / "out.jsonl", question=["what is in <video>?"], captions=True)
    names = [(kind, row[kind]) for row in found for kind in ("image", "video") if kind in row]
    shown = [("image", "blue0.png"), ("video", "clip.MP4"), ("video", "film"), ("video", "gone.mov")]
    assert list(dict.fromkeys(names)) == [*shown, ("image", "red0.png")]
    vlm = mmpeft.load(str(tiny_run), "cpu")
    (of_image,) = (row for row in found if row.get("image") == "red0.png" and "answer" in row)
    assert of_image["answer"] == vlm.ask(folder / "red0.png", "what is in <image>?")
    for name in ("clip.MP4", "film"):
        of_caption, of_question = (row for row in found if row.get("video") == name)
        video = mmpeft.Video(folder / name, frames=8)
        assert of_caption["caption"] == vlm.caption(video)
        assert of_question["answer"] == vlm.ask(video, "what is in <video>?")
    assert [row["video"] for row in found if "error" in row] == ["gone.mov"]
    (error,) = (row["error"] for row in found if "error" in row)
    assert error.startswith("'gone.mov': cannot be read")
    assert str(folder) not in error
    told = capsys.readouterr().out
    assert ": 4 of 5 captioned, 1 error " in told
    assert "1 other file was left out: 1 .txt" in told


def test_frames_and_rate_are_of_the_rows(folder, tiny_run, tmp_path):
    out = tmp_path / "out.jsonl"
    first = caption(folder, tiny_run, out, frames=2)
    for changed, told in [
        ({}, r"frames: made with 2, found 8$"),
        ({"frames": 3}, r"frames: made with 2, found 3$"),
        ({"fps": 4.0}, r"frames: made with 2, found None\n  fps: made with None, found 4\.0$"),
    ]:
        with pytest.raises(RefusedError, match=f"(?s)made with other .*\n  {told}"):
            caption(folder, tiny_run, out, **changed)
    assert caption(folder, tiny_run, out, frames=2) == first
    vlm = mmpeft.load(str(tiny_run), "cpu")
    by_rate = caption(folder, tiny_run, tmp_path / "rate.jsonl", fps=4.0, frames=3)
    assert [row["caption"] for row in by_rate if row.get("video") == "film"] == [
        vlm.caption(mmpeft.Video(folder / "film", 3, 4.0))
    ]


def test_frames_that_do_not_fit_are_the_videos_error_and_are_not_decoded(
    folder, tiny_run, tmp_path, monkeypatch
):
    monkeypatch.setattr("mmpeft.inference.captioning.worker.image_key", None)
    run = shutil.copytree(tiny_run, tmp_path / "run")
    manifest = json.loads((run / "mmpeft.json").read_text())
    manifest["template"]["max_length"] = 40
    (run / "mmpeft.json").write_text(json.dumps(manifest))
    found = caption(folder, run, tmp_path / "out.jsonl", fps=100.0)
    told = {row["video"]: row["error"] for row in found if "error" in row}
    tokens = mmpeft.load(str(run), "cpu").model.vision_encoder.num_tokens
    assert told["film"].startswith(
        f"'film': 20 frames have {20 * tokens} tokens, more than the run's max_length = 40"
    )


def test_a_run_of_images_alone_knows_nothing_of_frames(tiny_data, tiny_run, tmp_path):
    """So that what was begun before goes on."""
    caption(tiny_data / "images", tiny_run, tmp_path / "out.jsonl")
    meta = json.loads((tmp_path / "out.jsonl.shards" / "meta.json").read_text())
    assert not {"frames", "fps"} & set(meta)


def test_videos_may_be_left_out(folder, tiny_run, tmp_path, capsys):
    found = caption(folder, tiny_run, tmp_path / "out.jsonl", frames=0)
    assert [row["image"] for row in found] == ["blue0.png", "red0.png"]
    assert "4 other files were left out: " in (told := capsys.readouterr().out)
    assert all(f"1 {kind}" in told for kind in (".mp4", ".mov", ".txt", "without an ending"))
    for task in ({"frames": -1}, {"frames": 0, "fps": 1.0}):
        with pytest.raises(
            RefusedError, match=r"wanted how many frames of each video, 1 or more, or 0 alone"
        ):
            Task(**task)


def test_without_a_decoder_videos_are_refused_before_anything_is_loaded(
    folder, tiny_run, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(
        RefusedError, match=r"3 of the inputs are videos: .*pip install 'mmpeft\[video\]'; or .* --frames 0"
    ):
        caption(folder, tiny_run, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl.shards").exists()
    assert len(caption(folder, tiny_run, tmp_path / "out.jsonl", frames=0)) == 2


def test_a_video_that_another_has_replaced_is_no_more_the_one_captioned(folder, tiny_run, tmp_path):
    caption(folder, tiny_run, tmp_path / "out.jsonl")
    copy = shutil.copytree(folder, tmp_path / "copy")
    caption(copy, tiny_run, tmp_path / "out.jsonl")
    (folder / "clip.MP4").write_bytes(clip(11))
    with pytest.raises(RefusedError, match=r"other images; 'clip\.MP4' is not the one that was captioned"):
        caption(folder, tiny_run, tmp_path / "out.jsonl")


def test_its_content_is_known_without_its_frames(folder, monkeypatch):
    """Also where a machine that only joins has no decoder."""
    monkeypatch.setitem(sys.modules, "av", None)
    (listed,) = (each for each in find_images([str(folder)]) if each.name == "film")
    whole = content_digits(listed, ImageConfig())
    assert len(whole) == 16
    monkeypatch.undo()
    keys = {image_key(frame) for frame in sample_frames(folder / "film", 4)}
    assert len(keys) == 4
    assert sum(key.startswith(whole) for key in keys) == 1


def test_rows_of_a_table_name_videos_and_parquet_has_them(folder, tiny_run, tmp_path):
    rows = [
        {"id": 1, "video": "clip.MP4"},
        {"id": 2, "image": "red0.png"},
        {"id": 3, "video": {"path": "film"}},
        {"id": 4, "video": "film", "image": "red0.png"},
        {"id": 5, "video": "film"},
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = caption(folder / "rows.jsonl", tiny_run, tmp_path / "out.jsonl")
    assert [(row.get("video"), row.get("image"), row["id"]) for row in found] == [
        ("clip.MP4", None, "1"),
        (None, "red0.png", "2"),
        ("film", None, "3"),
        (None, "rows.jsonl:4", "4"),
    ]
    assert "found 1 images and 1 videos among the keys" in found[3]["error"]
    of_folder = {row.get("video"): row for row in caption(folder, tiny_run, tmp_path / "folder.jsonl")}
    assert found[0]["caption"] == of_folder["clip.MP4"]["caption"]
    left = caption(folder / "rows.jsonl", tiny_run, tmp_path / "left.jsonl", frames=0)
    assert [("error" in row, row["id"]) for row in left] == [
        (True, "1"),
        (False, "2"),
        (True, "3"),
        (True, "5"),
    ]


def test_the_command_line(folder, tiny_run, tmp_path):
    out = tmp_path / "out.parquet"
    words = ["caption", str(folder), "--run", str(tiny_run), "--output", str(out), "--workers", "1"]
    main([*words, "--fps", "2", "--frames", "2"])
    from pyarrow import parquet

    table = parquet.read_table(out).to_pylist()
    assert [row["video"] for row in table if row["video"]] == ["clip.MP4", "film", "gone.mov"]
    assert [row["image"] for row in table if row["image"]] == ["blue0.png", "red0.png"]
    before = out.read_bytes()
    os.unlink(out)
    main([*words, "--fps", "2", "--frames", "2"])
    assert out.read_bytes() == before

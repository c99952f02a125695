"""`mmpeft caption`: one row per image, once, whatever happens in between."""

import json
import os
import resource
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock, Timeout
from PIL import Image

import mmpeft
from mmpeft.cli import main
from mmpeft.data.images import ImageWorker
from mmpeft.errors import RefusedError
from mmpeft.inference.captioning import caption_folder, find_images
from tests.tiny import make_config, run_directory

SCRIPT = Path("scripts/caption_images.py").resolve()
STRANGE = ["two words.png", "größe 图.png", "line\nbreak.png", os.fsdecode(b"not utf8 \xff.png")]


@pytest.fixture
def photos(tmp_path, tiny_data) -> Path:
    """Nine images, one of them in deeper folders, a cut one, an empty one, and a file that is no image."""
    folder = tmp_path / "photos"
    (folder / "deep" / "er").mkdir(parents=True)
    images = sorted((tiny_data / "images").iterdir())
    for number, image in enumerate(images[:8]):
        shutil.copy(image, folder / f"{number}.png")
    shutil.copy(images[8], folder / "deep" / "er" / "Z.PNG")
    (folder / "3cut.png").write_bytes(images[0].read_bytes()[:60])
    (folder / "deep" / "empty.jpg").touch()
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture
def whole(photos, tiny_run, tmp_path) -> bytes:
    """What one uninterrupted run writes."""
    output = tmp_path / "whole.jsonl"
    caption_folder(str(photos), str(tiny_run), str(output), batch_size=4)
    return output.read_bytes()


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_a_row_per_image_in_sorted_order(photos, tiny_run, tmp_path, capsys):
    output = tmp_path / "new" / "captions.jsonl"
    caption_folder(str(photos), str(tiny_run), str(output), batch_size=4)
    found = rows(output)
    names = ["0.png", "1.png", "2.png", "3.png", "3cut.png", *(f"{n}.png" for n in range(4, 8))]
    assert [row["image"] for row in found] == [*names, "deep/empty.jpg", "deep/er/Z.PNG"]
    assert {row["image"] for row in found if "error" in row} == {"3cut.png", "deep/empty.jpg"}
    assert ': 9 of 11 captioned, 2 errors (see the rows with "error"), ' in capsys.readouterr().out
    vlm = mmpeft.load(str(tiny_run), "cpu")
    for row in found:
        if "error" not in row:
            assert row == {
                "image": row["image"],
                "caption": vlm.caption(photos / row["image"]),
                "adapter": "default",
            }


def test_base_and_adapter_are_told_apart(photos, tiny_run, tmp_path):
    output = tmp_path / "base.jsonl"
    caption_folder(str(photos), str(tiny_run), str(output), "base")
    assert {row["adapter"] for row in rows(output) if "adapter" in row} == {"base"}


def test_rows_of_a_run_without_finetunes_name_none(tiny_data, tiny_base, tmp_path):
    config = make_config(tmp_path / "config.yaml", tiny_base, tiny_data, model={"adapter": None})
    main(["fit", "--config", str(config), "--trainer.max_steps=1"])
    output = tmp_path / "captions.jsonl"
    caption_folder(str(tiny_data / "images"), str(run_directory(config)), str(output))
    assert {tuple(row) for row in rows(output)} == {("image", "caption")}


def test_a_cut_output_is_completed_to_the_same_bytes(photos, tiny_run, tmp_path, whole):
    output = tmp_path / "whole.jsonl"
    ends = [end + 1 for end in range(len(whole)) if whole[end : end + 1] == b"\n"]
    for length in (0, 1, ends[0] - 1, ends[0], ends[1] + 5, ends[3], ends[5] + 9, len(whole) - 1, len(whole)):
        output.write_bytes(whole[:length])
        caption_folder(str(photos), str(tiny_run), str(output), batch_size=4)
        assert output.read_bytes() == whole, f"cut at byte {length}"


def test_killed_and_started_again(photos, tiny_run, tmp_path, whole):
    output = tmp_path / "killed.jsonl"
    words = [str(photos), "--run", str(tiny_run), "--output", str(output), "--batch_size", "4"]
    process = subprocess.Popen([sys.executable, str(SCRIPT), *words], stderr=subprocess.DEVNULL)
    while process.poll() is None and (not output.exists() or not output.stat().st_size):
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert output.stat().st_size
    assert whole.startswith(output.read_bytes())
    caption_folder(str(photos), str(tiny_run), str(output), batch_size=4)
    assert output.read_bytes() == whole


def test_nothing_is_loaded_when_all_is_done(photos, tiny_run, tmp_path, whole, monkeypatch, capsys):
    monkeypatch.setattr("mmpeft.inference.vlm.load", None)
    capsys.readouterr()
    caption_folder(str(photos), str(tiny_run), str(tmp_path / "whole.jsonl"))
    told = capsys.readouterr().out
    assert told.endswith(
        ': 9 of 11 captioned (11 rows were there already), 2 errors (see the rows with "error")\n'
    )


def test_a_single_error_is_no_plural(tiny_data, tiny_run, tmp_path, capsys):
    folder = shutil.copytree(tiny_data / "images", tmp_path / "photos")
    caption_folder(str(folder), str(tiny_run), str(tmp_path / "whole.jsonl"))
    assert ": 12 of 12 captioned, " in (told := capsys.readouterr().out)
    assert " error" not in told
    (folder / "cut.png").write_bytes(b"no image")
    caption_folder(str(folder), str(tiny_run), str(tmp_path / "cut.jsonl"))
    assert ': 12 of 13 captioned, 1 error (see the rows with "error"), ' in capsys.readouterr().out


def test_every_image_is_decoded_once_also_beside_a_damaged_one(photos, tiny_run, tmp_path, monkeypatch):
    decoded = []
    monkeypatch.setattr("mmpeft.inference.vlm.cache_folder", lambda run: tmp_path / "no features")
    load = ImageWorker.load
    monkeypatch.setattr(
        ImageWorker, "load", lambda self, image, config: decoded.append(image) or load(self, image, config)
    )
    caption_folder(str(photos), str(tiny_run), str(tmp_path / "out.jsonl"), batch_size=4)
    times = [decoded.count(str(photos / f"{name}.png")) for name in range(8)]
    assert times == [1] * 8
    assert decoded.count(str(photos / "deep" / "er" / "Z.PNG")) == 1


def test_every_file_of_a_folder_is_captioned_or_counted(tiny_data, tiny_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    folder = tmp_path / "mixed"
    folder.mkdir()
    image = Image.open(tiny_data / "images" / "red0.png").convert("RGB")
    image.save(folder / "1.png")
    (folder / "2.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    image.save(folder / "3.avif")
    image.save(folder / "4.jfif", "JPEG")
    image.save(folder / "5", "PNG")
    image.save(folder / "6.bin", "PNG")
    (folder / "README").write_text("text")
    for name in ("notes.txt", "more.TXT", "rows.jsonl"):
        (folder / name).write_text("text")
    caption_folder(str(folder), str(tiny_run), str(tmp_path / "out.jsonl"))
    found = {row["image"]: row for row in rows(tmp_path / "out.jsonl")}
    assert list(found) == ["1.png", "2.HEIC", "3.avif", "4.jfif", "5"]
    assert [name for name, row in found.items() if "error" in row] == ["2.HEIC"]
    assert "HEIC" in found["2.HEIC"]["error"]
    told = capsys.readouterr().out
    assert "5 other files of the folder were left out: 2 .txt, " in told
    assert all(f"1 {kind}" in told for kind in (".bin", ".jsonl", "without an ending"))
    assert ": 4 of 5 captioned, 1 error " in told


def test_an_image_that_takes_too_long_is_an_error_and_the_others_are_captioned(tiny_data, tiny_run, tmp_path):
    run, folder = shutil.copytree(tiny_run, tmp_path / "run"), tmp_path / "photos"
    manifest = json.loads((run / "mmpeft.json").read_text())
    manifest["vision"]["image"]["max_seconds"] = 0.5
    (run / "mmpeft.json").write_text(json.dumps(manifest))
    shutil.copytree(tiny_data / "images", folder)
    Image.new("RGB", (11_000, 11_000)).save(folder / "large.png", compress_level=1)
    with ImageWorker() as worker:  # the first image of a process also starts it
        worker.load(str(folder / "red0.png"))
    caption_folder(str(folder), str(run), str(tmp_path / "out.jsonl"))
    errors = {row["image"]: row["error"] for row in rows(tmp_path / "out.jsonl") if "error" in row}
    assert "large.png" in errors
    assert "longer than 0.5 s" in errors["large.png"]


def test_strange_names_round_trip(tiny_data, tiny_run, tmp_path):
    folder = tmp_path / "strange"
    folder.mkdir()
    for name in STRANGE:
        shutil.copy(tiny_data / "images" / "red0.png", folder / name)
    caption_folder(str(folder), str(tiny_run), str(tmp_path / "out.jsonl"))
    found = rows(tmp_path / "out.jsonl")
    assert sorted(STRANGE) == [row["image"] for row in found]
    assert all("caption" in row and (folder / row["image"]).exists() for row in found)


def test_an_output_of_another_adapter_run_or_folder_is_refused(photos, tiny_run, tmp_path, whole):
    output = tmp_path / "whole.jsonl"
    with pytest.raises(ValueError, match="other run, adapter"):
        caption_folder(str(photos), str(tiny_run), str(output), "base")
    retrained = tmp_path / "retrained"
    shutil.copytree(tiny_run, retrained)
    weights = retrained / "adapters" / "default" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match="other run;"):
        caption_folder(str(photos), str(retrained), str(output))
    Image.new("RGB", (8, 8)).save(photos / "0new.png")
    with pytest.raises(ValueError, match="other images;"):
        caption_folder(str(photos), str(tiny_run), str(output))
    assert output.read_bytes() == whole
    caption_folder(str(photos), str(tiny_run), str(output), overwrite=True)
    assert len(rows(output)) == 12


def test_an_image_that_another_has_replaced_is_no_more_the_one_captioned(photos, tiny_run, tmp_path, whole):
    output = tmp_path / "whole.jsonl"
    elsewhere = shutil.copytree(photos, tmp_path / "elsewhere")
    caption_folder(str(elsewhere), str(tiny_run), str(output))  # a copy, as of a cluster's node, goes on
    state, content = (photos / "0.png").stat(), (photos / "0.png").read_bytes()
    (photos / "0.png").write_bytes(content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])
    os.utime(photos / "0.png", ns=(state.st_atime_ns, state.st_mtime_ns))
    with pytest.raises(ValueError, match="other images;"):
        caption_folder(str(photos), str(tiny_run), str(output))
    assert output.read_bytes() == whole


def test_foreign_and_edited_outputs_are_left_alone(photos, tiny_run, tmp_path, whole):
    foreign = tmp_path / "foreign.jsonl"
    foreign.write_text("precious\n")
    with pytest.raises(ValueError, match="--overwrite"):
        caption_folder(str(photos), str(tiny_run), str(foreign))
    assert foreign.read_text() == "precious\n"
    edited = tmp_path / "whole.jsonl"
    edited.write_bytes(b"\n".join(reversed(whole.splitlines())) + b"\n")
    with pytest.raises(ValueError, match="was edited"):
        caption_folder(str(photos), str(tiny_run), str(edited))


def test_two_runs_on_one_output(photos, tiny_run, tmp_path):
    output = tmp_path / "captions.jsonl"
    with FileLock(f"{output}.lock"), pytest.raises(Timeout):
        caption_folder(str(photos), str(tiny_run), str(output))
    assert not output.exists()


def test_a_full_disk_is_told_with_the_file_and_the_rows_so_far_are_gone_on_with(
    photos, tiny_run, tmp_path, whole
):
    output, (soft, hard) = tmp_path / "captions.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) - 50, hard))
    try:
        with pytest.raises(RefusedError, match=r"captions\.jsonl: no space left.*bytes are needed"):
            caption_folder(str(photos), str(tiny_run), str(output), batch_size=4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    caption_folder(str(photos), str(tiny_run), str(output), batch_size=4)
    assert output.read_bytes() == whole


def test_a_folder_is_no_output(photos, tiny_run, tmp_path):
    """It was not made with another run, and must not be overwritten."""
    for overwrite in (False, True):
        with pytest.raises(RefusedError, match=r"is a folder; name a file.*photos/captions\.jsonl"):
            caption_folder(str(photos), str(tiny_run), str(photos), overwrite=overwrite)


def test_wrong_arguments(tiny_run, tiny_data, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder, run, changes, message in [
        (tmp_path / "empty", tiny_run, {}, "no images"),
        (tiny_data, tiny_run, {"adapter": "nobody"}, r"no finetune 'nobody'; there are: default, base"),
        (tiny_data, tiny_run, {"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        (tiny_data, tmp_path, {}, "no run of mmpeft"),
    ]:
        with pytest.raises(ValueError, match=message):
            caption_folder(str(folder), str(run), str(tmp_path / "out.jsonl"), **changes)
    with pytest.raises(FileNotFoundError, match="nowhere is no folder; name the one"):
        find_images(str(tmp_path / "nowhere"))
    assert not (tmp_path / "out.jsonl").exists()


def test_the_command_line(photos, tiny_run, tmp_path, monkeypatch, capsys):
    def run(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(photos), "--output", str(output), *words])
        runpy.run_path(str(SCRIPT), run_name="__main__")

    output = tmp_path / "out.jsonl"
    run("--run", str(tiny_run))
    assert ": 9 of 11 captioned, 2 errors" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="1"):
        run("--run", str(tiny_run), "--strict")
    assert ": 9 of 11 captioned (11 rows were there already), 2 errors" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"error: .* no run of mmpeft"):
        run("--run", str(tmp_path))
    with pytest.raises(SystemExit, match=r"error: .*--overwrite"):
        run("--run", str(tiny_run), "--adapter", "base")
    run("--run", str(tiny_run), "--adapter", "base", "--overwrite")
    with FileLock(f"{output}.lock"), pytest.raises(SystemExit, match="error: another run"):
        run("--run", str(tiny_run))

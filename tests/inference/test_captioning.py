"""`mmpeft caption`: one row per image, once, whatever happens in between."""

import base64
import contextlib
import json
import os
import random
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import pytest
from filelock import FileLock
from PIL import Image
from pyarrow import parquet

import mmpeft
from mmpeft.cli import main
from mmpeft.data.image_lists import find_images
from mmpeft.data.images import ImageWorker, image_key
from mmpeft.errors import RefusedError
from mmpeft.inference import captioning
from mmpeft.inference.captioning import Task
from tests.tiny import make_config, run_directory

SCRIPT = Path("scripts/caption_images.py").resolve()
STRANGE = ["two words.png", "größe 图.png", "line\nbreak.png", os.fsdecode(b"not utf8 \xff.png")]


def caption_folder(
    folder: str,
    run: str,
    output: str,
    adapter: str | None = None,
    batch_size: int = 4,
    overwrite: bool = False,
) -> int:
    """In this process."""
    task = Task(None if adapter is None else [adapter], batch_size=batch_size)
    return captioning.caption([folder], run, output, task, workers=1, overwrite=overwrite)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Eleven images are three shards."""
    monkeypatch.setattr("mmpeft.inference.captioning.job.SHARD_IMAGES", 4)


def shards_of(output: Path) -> list[Path]:
    return sorted(output.with_name(f"{output.name}.shards").glob("[0-9]*.jsonl"))


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
            likely = row.pop("log_probability")
            assert row == {
                "image": row["image"],
                "caption": vlm.caption(photos / row["image"]),
                "adapter": "default",
            }
            assert likely < 0


def test_base_and_adapter_are_told_apart(photos, tiny_run, tmp_path):
    output = tmp_path / "base.jsonl"
    caption_folder(str(photos), str(tiny_run), str(output), "base")
    assert {row["adapter"] for row in rows(output) if "adapter" in row} == {"base"}


def test_rows_of_a_run_without_finetunes_name_none(tiny_data, tiny_base, tmp_path):
    config = make_config(tmp_path / "config.yaml", tiny_base, tiny_data, model={"adapter": None})
    main(["fit", "--config", str(config), "--trainer.max_steps=1"])
    output = tmp_path / "captions.jsonl"
    caption_folder(str(tiny_data / "images"), str(run_directory(config)), str(output))
    assert {tuple(row) for row in rows(output)} == {("image", "caption", "log_probability")}


def test_cut_damaged_and_missing_shards_are_made_again_to_the_same_bytes(
    photos, tiny_run, tmp_path, whole, capsys
):
    output = tmp_path / "whole.jsonl"
    shards = {path: path.read_bytes() for path in shards_of(output)}
    assert len(shards) == 3
    (first, content), (second, other), _ = shards.items()
    lines = content.splitlines(keepends=True)
    damaged = [b"", content[:1], content[:-1], b"".join(lines[:-1]), b"".join(lines[1:]), lines[-1]]
    for harm in [*damaged, content[:5] + b"?" + content[6:], content + b"{}\n", None]:
        output.unlink()
        first.write_bytes(harm) if harm is not None else first.unlink()
        capsys.readouterr()
        caption_folder(str(photos), str(tiny_run), str(output))
        assert output.read_bytes() == whole
        assert {path: path.read_bytes() for path in shards_of(output)} == shards
        told = capsys.readouterr()
        assert "(7 rows were there already)" in told.out
        assert ("is damaged: it is made again" in told.err) == (harm is not None)
    first.write_bytes(other)
    with pytest.raises(RefusedError, match=r"000000\.jsonl holds a shard of other captions, or another one"):
        caption_folder(str(photos), str(tiny_run), str(output))
    assert second.read_bytes() == other


def test_a_shard_that_was_removed_is_made_of_what_is_there_now(photos, tiny_run, tmp_path, whole):
    """And the joined file with it."""
    output = tmp_path / "whole.jsonl"
    (photos / "3cut.png").write_bytes((photos / "0.png").read_bytes())
    with pytest.raises(
        RefusedError, match=r"made with other images; '3cut\.png'.*: remove .*/000000\.jsonl to"
    ):
        caption_folder(str(photos), str(tiny_run), str(output))
    shards_of(output)[0].unlink()
    caption_folder(str(photos), str(tiny_run), str(output))
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["image"] for row in rows] == [json.loads(line)["image"] for line in whole.splitlines()]
    assert [row["image"] for row in rows if "error" in row] == ["deep/empty.jpg"]
    made = output.stat().st_mtime_ns
    caption_folder(str(photos), str(tiny_run), str(output))
    assert output.stat().st_mtime_ns == made


@pytest.mark.parametrize("name", ["meta.json", "joined.json"])
def test_notes_that_are_damaged_are_named(photos, tiny_run, tmp_path, whole, name):
    (path := tmp_path / "whole.jsonl.shards" / name).write_text("{")
    with pytest.raises(RefusedError, match=rf"{name} is damaged .*; remove it, or what it belongs to"):
        caption_folder(str(photos), str(tiny_run), str(tmp_path / "whole.jsonl"))
    assert path.read_text() == "{"


def test_a_joined_file_that_is_missing_is_joined_again(photos, tiny_run, tmp_path, whole, monkeypatch):
    (tmp_path / "whole.jsonl").unlink()
    monkeypatch.setattr("mmpeft.inference.vlm.load", None)
    caption_folder(str(photos), str(tiny_run), str(tmp_path / "whole.jsonl"))
    assert (tmp_path / "whole.jsonl").read_bytes() == whole


def command(photos: Path, run: Path, output: Path, *more: str) -> list[str]:
    words = [str(photos), "--run", str(run), "--output", str(output), "--batch_size", "4", *more]
    start = f"""
import sys
import mmpeft.inference.captioning.job as job
job.SHARD_IMAGES = 4
from mmpeft.cli import main
if __name__ == "__main__":
    main(["caption", *{words!r}])
"""
    script = output.with_suffix(".py")
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(start)
    return [sys.executable, str(script)]


ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path.cwd())}


def test_killed_and_started_again(photos, tiny_run, tmp_path, whole):
    output = tmp_path / "killed.jsonl"
    process = subprocess.Popen(
        command(photos, tiny_run, output, "--workers", "1"), stderr=subprocess.DEVNULL, env=ENVIRONMENT
    )
    while process.poll() is None and not shards_of(output):
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert shards_of(output)
    caption_folder(str(photos), str(tiny_run), str(output))
    assert output.read_bytes() == whole


@pytest.mark.slow
def test_twenty_kills_end_in_the_same_bytes(photos, tiny_run, tmp_path, whole):
    """At random moments; one that was quicker must have ended in them too, and is begun anew."""
    output, draw, kills = tmp_path / "killed.jsonl", random.Random(0), 0
    begun = time.monotonic()
    subprocess.run(
        command(photos, tiny_run, tmp_path / "timed.jsonl", "--workers", "1"), check=True, env=ENVIRONMENT
    )
    seconds = time.monotonic() - begun
    while kills < 20:
        process = subprocess.Popen(command(photos, tiny_run, output, "--workers", "1"), env=ENVIRONMENT)
        try:
            assert process.wait(seconds * draw.uniform(0.3, 1.1)) == 0
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
        else:
            assert output.read_bytes() == whole
            seconds *= 0.9  # the first was slower
            output = tmp_path / f"killed_{kills}.jsonl"
    subprocess.run(command(photos, tiny_run, output, "--workers", "1"), check=True, env=ENVIRONMENT)
    assert output.read_bytes() == whole


def test_two_workers_write_what_one_does(photos, tiny_run, tmp_path, whole):
    output = tmp_path / "two.jsonl"
    subprocess.run(
        command(photos, tiny_run, output, "--workers", "2"), check=True, env=ENVIRONMENT, timeout=120
    )
    assert output.read_bytes() == whole
    own = [path.read_bytes() for path in shards_of(output)]
    assert own == [path.read_bytes() for path in shards_of(tmp_path / "whole.jsonl")]


def test_a_worker_that_is_killed_ends_the_run_and_the_next_goes_on(photos, tiny_run, tmp_path, whole):
    output = tmp_path / "two.jsonl"
    words = command(photos, tiny_run, output, "--workers", "2")
    process = subprocess.Popen(words, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    while not shards_of(output) and process.poll() is None:
        time.sleep(0.01)
    for worker in _below(process.pid, b"spawn_main")[:1]:
        os.kill(worker, signal.SIGKILL)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 1 or output.exists()
    assert process.returncode == 0 or "a worker ended with code -9" in told
    caption_folder(str(photos), str(tiny_run), str(output))
    assert output.read_bytes() == whole


def test_jobs_of_an_array_are_joined_by_the_last_or_by_the_command(photos, tiny_run, tmp_path, whole, capsys):
    task, here = Task(batch_size=4), tmp_path / "here.jsonl"
    for part in ("2/2", "1/2"):
        captioning.caption([str(photos)], str(tiny_run), str(here), task, workers=1, shard=part)
        assert here.exists() == (part == "1/2")
    assert here.read_bytes() == whole
    elsewhere = shutil.copytree(photos, tmp_path / "other machine")
    apart = [str(tmp_path / name) for name in ("a", "b")]
    captioning.caption([str(photos)], str(tiny_run), apart[0], task, workers=1, shard="1/2")
    with pytest.raises(
        RefusedError, match=r"1 of 3 shards are in none of the folders, such as 000001\.jsonl"
    ):
        captioning.join(apart[:1], str(tmp_path / "too early.jsonl"))
    captioning.caption([str(elsewhere)], str(tiny_run), apart[1], task, workers=1, shard="2/2")
    assert "2 of 3 shards are other jobs'" in capsys.readouterr().out
    main(["join-captions", *apart, "--output", str(tmp_path / "both.jsonl")])
    assert (tmp_path / "both.jsonl").read_bytes() == whole
    captioning.caption([str(photos)], str(tiny_run), str(tmp_path / "c"), Task(), workers=1, shard="1/2")
    with pytest.raises(RefusedError, match=r"made of other things than .*\n  batch_size: .* has 4, found 64"):
        captioning.join([apart[0], str(tmp_path / "c")], str(tmp_path / "mixed.jsonl"))


def test_a_folder_that_another_job_has_just_begun_is_no_strangers(photos, tiny_run, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "captions.jsonl.1of2.lock").touch()
    caption_folder(str(photos), str(tiny_run), str(tmp_path / "new"))
    assert (tmp_path / "new" / "captions.jsonl").exists()


def test_folders_of_parquet_are_joined_and_names_that_it_cannot_hold_are_told(photos, tiny_run, tmp_path):
    os.rename(photos / "7.png", photos / STRANGE[-1])
    task, apart = Task(batch_size=4), [str(tmp_path / name) for name in ("a", "b")]
    for part, folder in zip(("1/2", "2/2"), apart, strict=True):
        captioning.caption([str(photos)], str(tiny_run), folder, task, workers=1, shard=part)
    captioning.join(apart, str(tmp_path / "all.jsonl"))
    with pytest.raises(RefusedError, match=r"the image name 'not utf8 .*' is no Unicode"):
        captioning.join(apart, str(tmp_path / "all.parquet"))
    for folder in apart:  # as --format parquet writes them
        os.rename(f"{folder}/captions.jsonl.shards", f"{folder}/captions.parquet.shards")
    captioning.join(apart, str(tmp_path / "again.jsonl"))
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "all.jsonl").read_bytes()


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "a/b", "1/2/3", "-1/2"])
def test_no_part_of_an_array(part, photos, tiny_run, tmp_path):
    with pytest.raises(RefusedError, match=r"--shard is .*; wanted number/jobs, from 1/4 to 4/4"):
        captioning.caption([str(photos)], str(tiny_run), str(tmp_path / "o.jsonl"), shard=part)


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
    hashed = []
    load = ImageWorker.load
    monkeypatch.setattr(
        ImageWorker,
        "load",
        lambda self, image, config, source: (
            decoded.append(source) or load(self, image, config, source=source)
        ),
    )
    monkeypatch.setattr(
        "mmpeft.inference.captioning.content.image_key",
        lambda image, config: hashed.append(image) or image_key(image, config),
    )
    captioning.caption(
        [str(photos)],
        str(tiny_run),
        str(tmp_path / "out.jsonl"),
        Task(["default", "base"], ["is it red?"], captions=True, batch_size=4),
        workers=1,
    )
    names = [row["image"] for row in rows(tmp_path / "out.jsonl")]
    assert Counter(decoded) == {repr(name): 1 for name in names if name != "deep/empty.jpg"}
    assert len(hashed) == len(set(hashed)) == 10
    assert Counter(names) == {
        name: 1 if name in ("3cut.png", "deep/empty.jpg") else 4 for name in dict.fromkeys(names)
    }


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
    assert "5 other files were left out: 2 .txt, " in told
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
    with pytest.raises(ValueError, match=r"other run;.*\n  run\.default: made with '\w+', found '\w+'"):
        caption_folder(str(photos), str(retrained), str(output))
    Image.new("RGB", (8, 8)).save(photos / "0new.png")
    with pytest.raises(ValueError, match="other images;"):
        caption_folder(str(photos), str(tiny_run), str(output))
    assert output.read_bytes() == whole
    caption_folder(str(photos), str(tiny_run), str(output), overwrite=True)
    assert len(rows(output)) == 12
    assert not list(tmp_path.rglob("*.part"))


def test_an_image_that_another_has_replaced_is_no_more_the_one_captioned(photos, tiny_run, tmp_path, whole):
    output = tmp_path / "whole.jsonl"
    elsewhere = shutil.copytree(photos, tmp_path / "elsewhere")
    caption_folder(str(elsewhere), str(tiny_run), str(output))  # a copy, as of a cluster's node, goes on
    state, content = (photos / "0.png").stat(), (photos / "0.png").read_bytes()
    (photos / "0.png").write_bytes(content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])
    os.utime(photos / "0.png", ns=(state.st_atime_ns, state.st_mtime_ns))
    with pytest.raises(ValueError, match=r"other images; '0\.png' is not the one that was captioned"):
        caption_folder(str(photos), str(tiny_run), str(output))
    assert output.read_bytes() == whole


def test_another_precision_of_the_base_is_another_run(photos, tiny_run, tmp_path, whole):
    """Its files are the same, its answers are not."""
    other = shutil.copytree(tiny_run, tmp_path / "other")
    manifest = json.loads((other / "mmpeft.json").read_text())
    manifest["language"]["dtype"] = "bfloat16"
    (other / "mmpeft.json").write_text(json.dumps(manifest))
    with pytest.raises(RefusedError, match=r"made with other run; "):
        caption_folder(str(photos), str(other), str(tmp_path / "whole.jsonl"))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (Task(batch_size=5), "batch_size: made with 4, found 5"),
        (Task(batch_size=4, threads=2), "threads: made with 1, found 2"),
        (Task(batch_size=4, max_new_tokens=3), "max_new_tokens: made with None, found 3"),
        (Task(batch_size=4, question=["is it?"]), r"question: made with \[None\], found \['is it\?'\]"),
        (Task(batch_size=4, choices=["a", "b"]), r"choices: made with None, found \['a', 'b'\]"),
    ],
)
def test_a_changed_setting_is_named(changed, named, photos, tiny_run, tmp_path, whole):
    with pytest.raises(RefusedError, match=rf"made with other {named.split(':')[0]}; .*\n  {named}$"):
        captioning.caption([str(photos)], str(tiny_run), str(tmp_path / "whole.jsonl"), changed, workers=1)


def test_foreign_and_edited_outputs_are_left_alone(photos, tiny_run, tmp_path, whole):
    foreign = tmp_path / "foreign.jsonl"
    foreign.write_text("precious\n")
    with pytest.raises(ValueError, match="--overwrite"):
        caption_folder(str(photos), str(tiny_run), str(foreign))
    assert foreign.read_text() == "precious\n"
    assert not foreign.with_name("foreign.jsonl.shards").exists()
    edited = tmp_path / "whole.jsonl"
    edited.write_bytes(b"\n".join(reversed(whole.splitlines())) + b"\n")
    with pytest.raises(ValueError, match="was edited"):
        caption_folder(str(photos), str(tiny_run), str(edited))


def test_two_runs_on_one_output(photos, tiny_run, tmp_path):
    output = tmp_path / "captions.jsonl"
    with FileLock(f"{output}.lock"), pytest.raises(RefusedError, match="another run is writing this output"):
        caption_folder(str(photos), str(tiny_run), str(output))
    assert not output.exists()


def test_a_full_disk_is_told_with_the_file_and_the_rows_so_far_are_gone_on_with(
    photos, tiny_run, tmp_path, whole
):
    output, (soft, hard) = tmp_path / "captions.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) - 50, hard))
    try:
        with pytest.raises(RefusedError, match=r"captions\.jsonl.*: no space left.*bytes are needed"):
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
        (tmp_path / "empty", tiny_run, {}, "holds no images"),
        (tiny_data, tiny_run, {"adapter": "nobody"}, r"no finetune 'nobody'; there are: default, base"),
        (tiny_data, tiny_run, {"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        (tiny_data, tmp_path, {}, "no run of mmpeft"),
    ]:
        with pytest.raises(ValueError, match=message):
            caption_folder(str(folder), str(run), str(tmp_path / "out.jsonl"), **changes)
    with pytest.raises(FileNotFoundError, match="nowhere is no folder and no file; name the folder"):
        caption_folder(str(tmp_path / "nowhere"), str(tiny_run), str(tmp_path / "out.jsonl"))
    assert not (tmp_path / "out.jsonl").exists()


def test_the_command_line(photos, tiny_run, tmp_path, monkeypatch, capsys):
    def run(*words: str) -> None:
        monkeypatch.setattr(
            sys, "argv", [str(SCRIPT), str(photos), "--workers=1", "--output", str(output), *words]
        )
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


def test_several_finetunes_and_questions_in_one_pass(photos, tiny_run, tmp_path):
    """As each asked alone, in the order image, finetune, question."""
    task = Task(["base", "default"], ["what color is it?", "is it red, or not?"], captions=True, batch_size=4)
    captioning.caption([str(photos)], str(tiny_run), str(tmp_path / "all.jsonl"), task, workers=1)
    found = [row for row in rows(tmp_path / "all.jsonl") if row["image"] == "0.png"]
    vlm = mmpeft.load(str(tiny_run), "cpu")
    for row, adapter in zip(found, ["base"] * 3 + ["default"] * 3, strict=True):
        assert row["adapter"] == adapter
        if "question" not in row:
            assert row["caption"] == vlm.caption(photos / "0.png", adapter)
        else:
            assert row["answer"] == vlm.ask(photos / "0.png", row["question"], adapter)
    assert [row.get("question") for row in found] == [None, *(task.question or ())] * 2


def test_choices_are_ranked(photos, tiny_run, tmp_path):
    output = tmp_path / "ranked.jsonl"
    words = ["--question", "what color, please, is it?", "--choices", "red,green,dark blue", "--workers", "1"]
    main(["caption", str(photos), "--run", str(tiny_run), "--output", str(output), *words])
    vlm = mmpeft.load(str(tiny_run), "cpu")
    for row in rows(output):
        if "error" not in row:
            assert row["question"] == "what color, please, is it?"
            ranked = vlm.rank(photos / row["image"], row["question"], ["red", "green", "dark blue"])
            assert row["answer"] == ranked[0][0]
            assert [own["choice"] for own in row["ranking"]] == [own for own, _ in ranked]
            assert [own["score"] for own in row["ranking"]] == pytest.approx([s for _, s in ranked], abs=1e-3)


@pytest.mark.parametrize(
    "inputs", [["photos", "tarred.tar", "rows.jsonl"], ["photos/*", "tarred.tar", "rows.jsonl"]]
)
def test_folders_globs_tars_and_tables_give_the_same_captions(
    inputs, photos, tiny_run, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    images = ["photos/0.png", "photos/1.png", "photos/3cut.png"]
    with tarfile.open("tarred.tar", "w") as tar:
        for name in [*images, "photos/notes.txt"]:
            tar.add(name)
    held = "data:image/png;base64," + base64.b64encode(Path(images[1]).read_bytes()).decode()
    listed = [{"id": 7, "image": images[0]}, {"id": "b", "image": held}, {"id": 8, "image": images[0]}]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*listed, {"id": 9}]))
    captioning.caption(inputs[:1], str(tiny_run), "folder", Task(batch_size=4), workers=1)
    of_folder = {row["image"]: row for row in rows(Path("folder/captions.jsonl"))}
    prefix = "" if inputs[0] == "photos" else "photos/"
    for given, names in [("tarred.tar", images), ("rows.jsonl", [images[0], "rows.jsonl:2", "rows.jsonl:4"])]:
        captioning.caption([given], str(tiny_run), f"of_{given[:3]}", Task(batch_size=4), workers=1)
        found = rows(Path(f"of_{given[:3]}/captions.jsonl"))
        assert [row["image"] for row in found] == names
        for row, name in zip(found, [*images[:2], None], strict=True):
            if name is not None:
                assert row["caption"] == of_folder[prefix + name.removeprefix("photos/")]["caption"]
            else:
                assert "error" in row
        assert [row.get("id") for row in found] == ([None] * 3 if given == "tarred.tar" else ["7", "b", "9"])


def test_parquet_has_the_same_rows_and_the_same_bytes_each_time(photos, tiny_run, tmp_path, whole):
    output = tmp_path / "table.parquet"
    caption_folder(str(photos), str(tiny_run), str(output))
    content = output.read_bytes()
    found = [
        {k: v for k, v in row.items() if v is not None} for row in parquet.read_table(output).to_pylist()
    ]
    assert found == [json.loads(line) for line in whole.splitlines()]
    output.unlink()
    caption_folder(str(photos), str(tiny_run), str(output))
    assert output.read_bytes() == content
    strange = shutil.copytree(photos, tmp_path / "strange")
    shutil.copy(photos / "0.png", os.fsencode(strange) + b"/not utf8 \xff.png")
    with pytest.raises(RefusedError, match="is no Unicode, which parquet cannot hold"):
        caption_folder(str(strange), str(tiny_run), str(tmp_path / "strange.parquet"))


@pytest.mark.parametrize(
    ("output", "more", "message"),
    [
        ("captions.csv", {}, r"ends in \.csv; wanted \.jsonl, \.parquet, or a folder"),
        ("captions.jsonl", {"format": "parquet"}, "is no parquet"),
        (
            "captions.jsonl",
            {"shard": "1/2", "overwrite": True},
            "--overwrite would remove other jobs' shards",
        ),
    ],
)
def test_what_does_not_go_together(output, more, message, photos, tiny_run, tmp_path):
    with pytest.raises(RefusedError, match=message):
        captioning.caption([str(photos)], str(tiny_run), str(tmp_path / output), **more)
    assert not list(tmp_path.glob("captions*"))
    with pytest.raises(RefusedError, match="adapter 'default' is named twice"):
        Task(["default", "base", "default"])


def test_an_image_given_twice_is_refused(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RefusedError, match=r"the image 'photos/0\.png' is given twice"):
        find_images(["photos", "photos/0.png"])


@pytest.mark.slow
def test_on_ray_a_killed_worker_changes_nothing(photos, tiny_run, tmp_path, whole):
    """Two actors of a real cluster, one of whose processes is killed after the first shard."""
    pytest.importorskip("ray")
    output = tmp_path / "on_ray.jsonl"  # beside it lies a script of that name, which is not to be ray
    process = subprocess.Popen(
        command(photos, tiny_run, output, "--engine", "ray", "--workers", "2"), env=ENVIRONMENT
    )
    while not shards_of(output) and process.poll() is None:
        time.sleep(0.01)
    actors = _below(process.pid, b"ray::_Actor")
    assert actors
    os.kill(actors[0], signal.SIGKILL)
    assert process.wait(timeout=180) == 0
    assert output.read_bytes() == whole


@pytest.mark.slow
def test_on_ray_workers_that_always_die_end_the_run(photos, tiny_run, tmp_path, whole):
    """As where memory has no room for the model."""
    pytest.importorskip("ray")
    words = command(photos, tiny_run, tmp_path / "dies.jsonl", "--engine", "ray", "--workers", "1")
    script = Path(words[-1])
    dies = """
import os
from mmpeft.inference.captioning import on_ray
class Dies:
    def __init__(self, job, folder): pass
    def make(self, shard): os._exit(9)
on_ray._Actor = Dies
"""
    script.write_text(dies + script.read_text())
    ended = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=180)
    assert ended.returncode == 1
    assert "error: Ray ended the work" in ended.stderr
    assert "Traceback" not in ended.stderr


def _below(process: int, called: bytes) -> list[int]:
    """The processes of this name that it has started, or that these have."""
    found = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, task.read_text().split()):
                own = called in Path(f"/proc/{child}/cmdline").read_bytes()
                found += [child] * own + _below(child, called)
    return found

"""Records on disk: what was read comes back as it was, is opened again only while it is still theirs, and is never
half."""

import io
import json
import os
import random
import shutil
import subprocess
import sys
import tracemalloc
from array import array
from pathlib import Path

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from mmpeft.data import kept_stores, sources
from mmpeft.data.layouts.notes import Notes
from mmpeft.data.sequences import Chained
from mmpeft.data.sources import DataError, check_images, load_records
from mmpeft.data.store import content_of, first_of_image_sets
from tests.data.layouts.writing import clip
from tests.tiny import write_jsonl


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Folder of the stores, which are kept however small they are."""
    monkeypatch.setattr(kept_stores, "KEPT_BYTES", 0)
    monkeypatch.setenv("MMPEFT_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "records"


@pytest.fixture
def folder(tmp_path):
    for name in "abc":
        Image.new("RGB", (2, 2), {"a": "red", "b": "blue", "c": "lime"}[name]).save(tmp_path / f"{name}.png")
    return tmp_path


def rows(count=9):
    texts = ["what?", 'Ünïcödé \U0001f642 \n\t"', "is <image> red?"]
    own = [
        {
            "id": f"n{number}",
            "image": f"{'abc'[number % 3]}.png",
            "question": texts[number % 3],
            "answer": "no",
        }
        for number in range(count)
    ]
    own[1] |= {"choices": ["yes", "no"]}
    own[2] |= {"answers": ["no", "maybe"], "task": "vqa"}
    return own


def refuse_reading(monkeypatch):
    def read_rows(path):
        raise AssertionError(f"{path} is read again")

    monkeypatch.setattr(sources, "read_rows", read_rows)


def test_what_is_kept_is_what_was_read(folder, kept, monkeypatch):
    path = write_jsonl(folder / "data.jsonl", rows())
    first = load_records(path)
    refuse_reading(monkeypatch)
    again = load_records(path)
    monkeypatch.undo()
    held = load_records(path)
    assert (first.path, again.path, held.path) == (*kept.glob("*.records"), *kept.glob("*.records"), None)
    assert list(first) == list(again) == list(held)
    assert first.content == again.content == held.content
    assert held[1]["turns"] == [('<image>Ünïcödé \U0001f642 \n\t"', "no")]
    assert held[1]["choices"] == ["yes", "no"]


def test_images_that_came_as_bytes_are_stored_once(folder, kept):
    content = [(folder / f"{name}.png").read_bytes() for name in "ab"]
    big = content[0] + b"\0" * 100_000
    images = [[{"bytes": each, "path": None}] for each in (big, content[1], big, big)]
    table = pyarrow.table({"images": images, "question": ["what?"] * 4, "answer": ["a", "b", "c", "d"]})
    parquet.write_table(table, folder / "rows.parquet")
    records = load_records(folder / "rows.parquet")
    assert [record["images"] for record in records] == [[big], [content[1]], [big], [big]]
    assert len(big) < records.path.stat().st_size < 2 * len(big)
    assert [record["turns"][0][1] for record in first_of_image_sets(records)] == ["a", "b"]


def test_a_sequence_like_any_other(folder, kept):
    records = load_records(write_jsonl(folder / "data.jsonl", rows(20)))
    held = list(records)
    rng = random.Random(0)
    for _ in range(50):
        some = slice(
            *(rng.choice([None, *range(-25, 25)]) for _ in range(2)), rng.choice([None, 1, 3, -1, -2])
        )
        assert list(records[some]) == held[some]
        assert list(records[some][1:-1]) == held[some][1:-1]
        chained = Chained([records[:7], [], records[some]])
        assert list(records[:7] + records[some]) == list(chained)
        assert list(chained) == [*held[:7], *held[some]] == [chained[n] for n in range(len(chained))]
        firsts = {tuple(record["images"]): record for record in reversed(held[some])}
        assert list(first_of_image_sets(records[some])) == [r for r in held[some] if r in firsts.values()]
    assert records[-1] == held[-1]
    with pytest.raises(IndexError):
        records[20]
    assert content_of(records[3:5]) != content_of(records[3:6])


def test_notes_of_the_reading_are_there_at_every_start(folder, kept, monkeypatch):
    """Such as which rows were left out."""
    path = write_jsonl(folder / "data.jsonl", [*rows(), {"question": "what?"}, rows()[0]])

    def load():
        notes = Notes()
        return load_records(path, on_bad_sample="skip", notes=notes), notes

    read, noted = load()
    assert len(read) == len(rows())
    assert noted.skipped == {"not valid": 2}
    for most in (0, 2**23):  # kept, and not
        monkeypatch.setattr(kept_stores, "KEPT_BYTES", most)
        again, notes = load()
        assert (list(again), notes) == (list(read), noted)


def same_size_and_time(path, old, new):
    state = path.stat()
    text = path.read_text()
    path.write_text(text.replace(old, new))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (state.st_size, state.st_mtime_ns)


def test_a_file_that_has_changed_is_read_again(folder, kept):
    path = write_jsonl(folder / "data.jsonl", rows())
    assert load_records(path)[0]["turns"][0][1] == "no"
    same_size_and_time(path, '"no"', '"so"')
    assert load_records(path)[0]["turns"][0][1] == "so"
    write_jsonl(path, rows(4))
    assert len(load_records(path)) == 4
    assert len(list(kept.glob("*.records"))) == 1


def test_other_settings_and_roots_have_stores_of_their_own(folder, kept):
    path = write_jsonl(folder / "data.jsonl", rows())
    other = folder / "other"
    other.mkdir()
    for name in "abc":
        Image.new("RGB", (2, 2)).save(other / f"{name}.png")
    assert load_records(path)[0]["task"] is None
    assert load_records(path, task="qa")[0]["task"] == "qa"
    assert load_records(path, image_root=other)[0]["images"] == [str(other / "a.png")]
    assert load_records(path)[0]["images"] == [str(folder / "a.png")]
    assert len(list(kept.glob("*.records"))) == 3


def test_links_that_lead_elsewhere_are_followed_again(folder, kept):
    (folder / "one").mkdir()
    (folder / "two").mkdir()
    for name in ("one", "two"):
        Image.new("RGB", (2, 2)).save(folder / name / "d.png")
    (folder / "now").symlink_to("one")
    (folder / "e.png").symlink_to("a.png")
    own = [{"question": "what?", "answer": "it", "image": image} for image in ("now/d.png", "e.png")]
    path = write_jsonl(folder / "data.jsonl", own)
    named = [record["images"] for record in load_records(path)]
    assert named == [[str(folder / "one/d.png")], [str(folder / "a.png")]]
    (folder / "now").unlink()
    (folder / "now").symlink_to("two")
    assert load_records(path)[0]["images"] == [str(folder / "two/d.png")]
    (folder / "e.png").unlink()
    (folder / "e.png").symlink_to(folder.parent)
    with pytest.raises(DataError, match="outside the image root"):
        load_records(path)


@pytest.mark.parametrize("named", ["5", "in/5", "in\\5"])
def test_an_ending_that_was_found_is_looked_for_again(folder, kept, monkeypatch, named):
    image, path = folder / "in" / "5.png", folder / "data.jsonl"
    image.parent.mkdir()
    shutil.copy(folder / "a.png", image)
    root = image.parent if named == "5" else folder
    write_jsonl(path, [{"question": "what?", "answer": "it", "image": named}])

    def load():
        return load_records(path, image_root=root)[0]["images"]

    assert load() == [str(image)]
    with monkeypatch.context() as patched:
        refuse_reading(patched)
        assert load() == [str(image)]
    image.rename(image.with_suffix(".bmp"))
    assert load() == [str(image.with_suffix(".bmp"))]
    shutil.copy(folder / "a.png", image)
    with pytest.raises(DataError, match="may be any of"):
        load()


def test_a_file_without_ending_that_gets_one_is_found(folder, kept):
    (folder / "a.png").rename(folder / "5")
    path = write_jsonl(folder / "data.jsonl", [{"question": "what?", "answer": "it", "image": "5"}])
    assert load_records(path)[0]["images"] == [str(folder / "5")]
    (folder / "5").rename(folder / "5.png")
    assert load_records(path)[0]["images"] == [str(folder / "5.png")]


def test_frames_of_a_video_are_counted_again_once_it_changed(folder, kept, monkeypatch):
    pytest.importorskip("av")
    path = write_jsonl(
        folder / "data.jsonl", [{"question": "what?", "answer": "it", "video": "v.mp4", "frames": 3}]
    )

    def numbers():
        return [int(name.partition("#frame=")[2]) for name in load_records(path)[0]["images"]]

    (folder / "v.mp4").write_bytes(clip(10))
    assert numbers() == [0, 4, 9]
    with monkeypatch.context() as patched:
        refuse_reading(patched)
        assert numbers() == [0, 4, 9]
    (folder / "v.mp4").write_bytes(clip(5))
    assert numbers() == [0, 2, 4]


def test_very_many_links_are_read_again_and_not_held(folder, kept, monkeypatch):
    from mmpeft.data.layouts import beside

    monkeypatch.setattr(beside, "KEPT", 1)
    for name in "de":
        (folder / f"{name}.png").symlink_to("a.png")
    path = write_jsonl(
        folder / "data.jsonl", [{"question": "what?", "answer": "it", "image": f"{n}.png"} for n in "de"]
    )
    assert load_records(path).header["beside"] is None


def test_another_version_of_the_code_reads_again(folder, kept, monkeypatch):
    path = write_jsonl(folder / "data.jsonl", rows())
    load_records(path)
    monkeypatch.setattr(kept_stores, "code_hash", lambda: "newer")
    with monkeypatch.context() as patched:
        refuse_reading(patched)
        with pytest.raises(AssertionError, match="read again"):
            load_records(path)
    assert load_records(path).header["code"] == "newer"


@pytest.mark.parametrize("left", [0, 5, 200, -9, -1])
def test_a_damaged_store_is_made_again(folder, kept, left):
    path = write_jsonl(folder / "data.jsonl", rows())
    whole = list(load_records(path))
    (store,) = kept.glob("*.records")
    store.write_bytes(store.read_bytes()[:left])
    assert list(load_records(path)) == whole


def test_what_ends_in_the_middle_leaves_nothing(folder, kept, monkeypatch):
    path = write_jsonl(folder / "data.jsonl", rows())

    def two_rows(path):
        yield from list(read_rows(path))[:2]
        raise KeyboardInterrupt

    read_rows = sources.read_rows
    with monkeypatch.context() as patched:
        patched.setattr(sources, "read_rows", two_rows)
        with pytest.raises(KeyboardInterrupt):
            load_records(path)
    assert [file.suffix for file in kept.iterdir()] == [".lock"]
    assert len(load_records(path)) == 9


def test_a_file_that_grows_while_it_is_read_is_refused(folder, kept, monkeypatch):
    path = write_jsonl(folder / "data.jsonl", rows())

    def growing(file):
        yield from list(read_rows(file))
        with path.open("a") as file:
            file.write(json.dumps(rows()[0] | {"id": "late"}) + "\n")

    read_rows = sources.read_rows
    for most in (0, 2**23):  # kept, and not
        monkeypatch.setattr(kept_stores, "KEPT_BYTES", most)
        monkeypatch.setattr(sources, "read_rows", growing)
        with pytest.raises(ValueError, match="changed while it was read"):
            load_records(path)
        write_jsonl(path, rows())
        assert not list(kept.glob("*.records"))


def test_stores_of_files_that_are_gone_go_too(folder, kept):
    gone = write_jsonl(folder / "gone.jsonl", rows())
    load_records(gone)
    (counts,) = [store.with_suffix(".counts") for store in kept.glob("*.records")]
    counts.touch()
    gone.unlink()
    load_records(write_jsonl(folder / "data.jsonl", rows()))
    assert len(list(kept.glob("*.records"))) == 1
    assert not counts.exists()


def test_two_processes_at_once_read_once(folder, kept):
    path = write_jsonl(folder / "data.jsonl", rows(3000))
    code = (
        "from mmpeft.data import kept_stores, sources; kept_stores.KEPT_BYTES = 0; read = sources.read_rows\n"
        "def told(path): print('read', end=' '); yield from read(path)\n"
        f"sources.read_rows = told; print(len(sources.load_records({str(path)!r})))"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    assert sorted(process.communicate()[0] for process in both) == ["3000\n", "read 3000\n"]


def test_ids_are_compared_and_not_their_hashes_alone(folder):
    own = rows(6)
    own[4]["id"] = own[1]["id"]
    records = load_records(write_jsonl(folder / "data.jsonl", rows(6)))
    assert list(sources._repeated(records, array("q", [7] * 6))) == []
    with pytest.raises(DataError, match=r"data.jsonl:5 \(id 'n1'\): the id is also used at data.jsonl:2"):
        load_records(write_jsonl(folder / "data.jsonl", own))


def test_problems_of_both_kinds_are_told_in_the_order_of_the_rows(folder):
    own = [{"id": str(n // 2), "question": "what?", "answer": "" if n % 3 == 0 else "it"} for n in range(90)]
    with pytest.raises(DataError) as caught:
        load_records(write_jsonl(folder / "data.jsonl", own))
    first, *listed, last = str(caught.value).splitlines()
    told = [int(line.split(":")[1].split(" ")[0]) for line in listed]
    assert told == sorted(told)
    bad = [n for n in range(90) if n % 3 == 0]
    repeated = [n for n in range(1, 90, 2) if n % 3 and (n - 1) % 3]
    assert told == [n + 1 for n in sorted(bad + repeated)[:20]]
    assert f"{len(bad) + len(repeated)} problem(s)" in first
    assert last.strip() == f"and {len(bad) + len(repeated) - 20} more"


def test_an_image_that_is_missing_is_told_once_for_a_store(folder, kept):
    own = rows(9)
    (folder / "b.png").unlink()
    (problem,) = check_images(load_records(write_jsonl(folder / "data.jsonl", own)))
    assert problem.startswith("data.jsonl:2 ")


def test_memory_does_not_grow_with_the_rows(folder, kept):
    """40 bytes a row are the index; as dicts and texts it would be a thousand."""
    held = []
    for count in (500, 4500):
        path = write_jsonl(folder / "data.jsonl", [row | {"question": "w" * 400} for row in rows(count)])
        load_records(path)
        tracemalloc.start()
        records = load_records(path)
        held.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        assert len(records) == count
    assert (held[1] - held[0]) / 4000 < 40


def test_records_without_a_store_go_to_a_nameless_file_once_they_are_many(folder, monkeypatch):
    monkeypatch.setenv("MMPEFT_HOME", str(folder / "home"))
    path = write_jsonl(folder / "data.jsonl", rows(60))
    held = load_records(path)
    spool = kept_stores.Spool(folder / "home" / "records", 1000)
    monkeypatch.setattr(kept_stores, "Spool", lambda *_: spool)
    assert list(load_records(path)) == list(held)
    assert not isinstance(spool._file, io.BytesIO)
    assert list(Path(folder / "home" / "records").iterdir()) == []

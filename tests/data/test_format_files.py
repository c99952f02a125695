"""Files are read by row whatever their format, sets of the hub by split, and image names as the files are spelt."""

import gzip
import json
import os
import subprocess
import sys
import tracemalloc

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from mmpeft.data.formats import DataError, find_files, read_rows
from mmpeft.data.formats.json_text import CHUNK
from mmpeft.data.formats.splits import split_in_name
from mmpeft.data.image_names import ImageNames
from mmpeft.data.layouts.notes import Notes
from mmpeft.data.sources import load_records
from tests.data.layouts.writing import document, images, lines, png, saved, table, tar
from tests.data.layouts.writing import parquet as parquet_file

ROW = {"question": "What?", "answer": "A cat."}


def rows_of(path, **options):
    return [(place, row) for file in find_files(path, **options) for place, row in read_rows(file)]


WIDE = [{"id": n, "question": "What?", "answer": "x" * 40_000} for n in range(400)]
"""16 MB of rows."""


def write_wide(folder, name):
    if name.endswith("array.json"):
        return document(folder, name, WIDE)
    if name.endswith("document.json"):
        return document(folder, name, {"info": {}, "data": WIDE})
    if name.endswith("objects.json"):
        return document(folder, name, WIDE[0], 1) and _repeat(folder / name)
    if name.endswith("csv"):
        return table(folder, name, WIDE[0].keys(), *[[str(value) for value in row.values()] for row in WIDE])
    if name.endswith("tar"):
        return tar(folder, name, [(f"{row['id']}.json", json.dumps(row)) for row in WIDE])
    return lines(folder, name, *WIDE)


def _repeat(path):
    path.write_text("\n".join([path.read_text()] * len(WIDE)))
    return path.name


WIDE_NAMES = ["array.json", "document.json", "objects.json", "a.jsonl", "a.jsonl.gz", "a.csv", "a.tar"]


@pytest.mark.parametrize("name", WIDE_NAMES)
def test_no_more_is_held_than_rows_need(tmp_path, name):
    path = tmp_path / write_wide(tmp_path, name)
    (file,) = find_files(path)
    assert sum(1 for _ in read_rows(file)) == len(WIDE)  # imports are not counted
    tracemalloc.start()
    count = sum(1 for _, row in read_rows(file) if row["question"] == "What?")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == len(WIDE)
    assert peak < 10 * CHUNK  # a sixth of the file


def test_of_many_members_of_a_tar_no_index_is_held(tmp_path):
    path = tmp_path / tar(tmp_path, "a.tar", [(f"{n}.json", json.dumps(ROW)) for n in range(10_000)])
    (file,) = find_files(path)
    tracemalloc.start()
    assert sum(1 for _ in read_rows(file)) == 10_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3_000_000  # with tarfile's own index 5 MB


READ_AND_MEASURE = """
import sys
import pyarrow.parquet
from mmpeft.data.formats import find_files, read_rows
peak = lambda: int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]) / 1024
before = peak()
count = sum(len(row["image"]["bytes"]) for file in find_files(sys.argv[1]) for _, row in read_rows(file))
print(count, peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
@pytest.mark.parametrize(("layout", "most"), [("100 rows", 100), ("one page", 50), ("arrow", 200)])
def test_a_large_file_is_read_by_row(tmp_path, layout, most):
    """Of 160 MB in row groups of 100 images, as Hugging Face writes them, pages of 20 MB are held; of one page, as
    pandas writes it, a piece; of Arrow's the pages that are mapped, which the system takes back."""
    rows = [{"image": {"bytes": os.urandom(200_000), "path": None}} for _ in range(800)]
    if layout != "arrow":
        path = tmp_path / "a.parquet"
        size = 100 if layout == "100 rows" else None
        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=size)
    else:
        path = tmp_path / saved(tmp_path, "saved", {"": rows})
    del rows
    run = subprocess.run(
        [sys.executable, "-c", READ_AND_MEASURE, str(path)], capture_output=True, text=True, check=True
    )
    size, added = map(float, run.stdout.split())
    assert size == 160_000_000
    assert added < most


def test_parquet_has_null_for_nan_and_keeps_types(tmp_path):
    rows = [{"a": 1, "b": 0.5, "c": ["x"], "d": {"e": b"y"}}, {"a": 2, "b": float("nan"), "c": [], "d": None}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert rows_of(tmp_path / "a.parquet") == [(1, rows[0]), (2, rows[1] | {"b": None})]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(json_values, max_size=5),
    st.sampled_from([None, 1]),
    st.booleans(),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    st.integers(1, 40),
)
def test_json_in_pieces_is_what_the_json_library_reads(
    tmp_path_factory, rows, indent, ascii_only, encoding, step
):
    """However the pieces fall in which the file is read."""
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "a.json").write_bytes(
        json.dumps(rows, indent=indent, ensure_ascii=ascii_only).encode(encoding, "replace")
    )
    wanted = json.loads((folder / "a.json").read_bytes().decode(encoding))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmpeft.data.formats.json_text.CHUNK", step)
        assert [row for _, row in rows_of(folder / "a.json")] == wanted


def test_a_cut_gz_is_told(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(
        gzip.compress("".join(json.dumps(ROW | {"id": n}) + "\n" for n in range(9000)).encode())[:-2000]
    )
    with pytest.raises(DataError, match=r"a\.jsonl\.gz:\d+: what follows cannot be read"):
        load_records(path)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00002-ab12.parquet", "train"),
        ("train.parquet", "train"),
        ("my_val_set.parquet", "validation"),
        ("squad-dev.parquet", "validation"),
        ("own-00000-of-00001.parquet", "own"),
        ("latest.parquet", None),
        ("contest.parquet", None),
        ("train_test.parquet", None),
    ],
)
def test_splits_in_names(tmp_path, name, split):
    assert split_in_name(tmp_path / name) == split


def test_classes_that_a_split_lacks_are_told(tmp_path):
    """Else a test would be ranked among fewer choices than were learnt, or among one that never was."""
    names = {"train": ("cat", "cow", "dog"), "val": ("cat", "cow", "dog"), "test": ("cat", "emu")}
    images(tmp_path, *(f"set/{split}/{name}/1.png" for split, own in names.items() for name in own))
    for path in (f"{tmp_path}/set:test", tmp_path / "set" / "train"):
        load_records(path, notes=(notes := Notes()))
        assert notes.lines() == [
            f"the choices are the 4 classes of all splits of {tmp_path}/set, in test alone: emu; in train and val "
            "alone: cow, dog"
        ]
    images(
        tmp_path,
        *(f"set/test/{name}/1.png" for name in ("cow", "dog")),
        *(f"set/{s}/emu/1.png" for s in names),
    )
    load_records(tmp_path / "set" / "train", notes=(notes := Notes()))
    assert notes.lines() == []


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that has one set of two splits; gives what it was asked for."""
    import datasets
    import huggingface_hub

    rows = {"train": [ROW, ROW], "validation": [ROW | {"answer": "A dog."}]}
    made = datasets.load_from_disk(str(tmp_path / saved(tmp_path, "cache", rows)))
    asked = []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "not made yet"))
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda *words, **more: asked.append((*words, more)) or made)
    monkeypatch.chdir(tmp_path)
    return asked


def test_sets_of_the_hub(hub):
    (record,) = load_records("someone/some-set@v1.0:small:val")
    assert (record["turns"], record["where"]) == ([("What?", "A dog.")], "someone-some-set-validation:1")
    assert hub == [("someone/some-set", "small", {"revision": "v1.0"})]
    assert len(load_records("someone/some-set:train")) == 2
    with pytest.raises(
        DataError, match=r"splits \['train', 'validation'\], none is named.* someone/some-set:train"
    ):
        load_records("someone/some-set")
    with pytest.raises(DataError, match=r"found 'test'; name one of them: someone/some-set:train"):
        load_records("someone/some-set:test")


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path, monkeypatch):
    import huggingface_hub

    def unreachable(*_, **__):
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    with pytest.raises(DataError, match=r"neither a file nor a folder .*ConnectionError: no route") as caught:
        load_records("someone/some-set:train")
    assert "\n" not in str(caught.value)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match="closest names"):  # a folder of ours, whose file is misspelt
        load_records("data/trian")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("42", "in/COCO_val2014_000000000042.jpg"),
        ("000000000042", "in/COCO_val2014_000000000042.jpg"),
        ("7", "in/7.png"),
        ("scan", "in/scan.png"),
        ("1.2.840.1", "in/1.2.840.1.png"),
        ("43", None),
        ("sca", None),
        ("scan.jpg", None),
        ("COCO_val2014_000000000042", "in/COCO_val2014_000000000042.jpg"),
        ("..\\in\\7.png", "in/7.png"),
    ],
)
def test_names_of_image_files(tmp_path, name, found):
    images(
        tmp_path,
        *(f"in/{n}" for n in ("COCO_val2014_000000000042.jpg", "7.png", "scan.png", "1.2.840.1.png")),
    )
    (tmp_path / "in/scan.txt").write_text("a scan")
    path = ImageNames().find(str(tmp_path / "in" / name))
    assert (path and os.path.realpath(path)) == (found and os.path.realpath(tmp_path / found))


def test_a_name_that_means_two_images_is_refused(tmp_path):
    images(tmp_path, "a.png", "a.jpg")
    with pytest.raises(DataError, match=r"'a' may be any of \['a.jpg', 'a.png'\]"):
        load_records(tmp_path / lines(tmp_path, "d.jsonl", ROW | {"image": "a"}))
    (tmp_path / "secret.png").write_bytes(png())
    (tmp_path / "root").mkdir()
    with pytest.raises(DataError, match="outside the image root"):
        load_records(
            tmp_path / lines(tmp_path, "d.jsonl", ROW | {"image": "..\\secret.png"}),
            image_root=tmp_path / "root",
        )


@pytest.mark.parametrize("cut", range(0, 6 * 512, 256))
def test_a_tar_that_is_cut_or_damaged_anywhere_is_told(tmp_path, cut):
    """Between members, in a header and in a member: six blocks are three samples of a header and a block each."""
    path = tmp_path / tar(tmp_path, "a.tar", [(f"{n}.json", json.dumps(ROW)) for n in range(3)])
    whole = path.read_bytes()
    assert len(load_records(path)) == 3
    path.write_bytes(whole[:cut])
    with pytest.raises(DataError, match=r"a\.tar:.*the archive is cut or damaged after byte \d+"):
        load_records(path)
    if cut // 512 % 2 == 0:  # a header
        path.write_bytes(whole[:cut] + b"#" + whole[cut + 1 :])
        with pytest.raises(DataError, match=r"the archive is cut or damaged after byte \d+"):
            load_records(path)


def test_lists_of_classes_are_lists_of_names(tmp_path):
    kind = {"_type": "List", "feature": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    path = tmp_path / parquet_file(tmp_path, "a.parquet", {"tags": [1, 0]}, features={"tags": kind})
    assert rows_of(path) == [(1, {"tags": ["dog", "cat"]})]


def test_problems_of_a_document_are_told_by_its_entries(tmp_path):
    rows = [{"image_id": n, "id": n, "caption": "a cat"} for n in (1, 2, 3)]
    made = {"images": [{"id": 1, "file_name": "1.png"}, {"id": 3, "file_name": "3.png"}], "annotations": rows}
    with pytest.raises(DataError) as caught:
        load_records(tmp_path / document(tmp_path, "a.json", made))
    assert str(caught.value).splitlines()[1:] == [
        "  a.json:annotations 2: image_id is 2, which is not among images; add it there or drop the row"
    ]

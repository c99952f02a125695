"""What would have to be dropped or guessed is refused, in words that name it."""

import json

import pytest

from mmpeft.data.sources import DataError, load_records
from tests.data.layouts.writing import document, lines, parquet, saved, table, tar, text

ROW = {"question": "What?", "answer": "A cat."}
COCO = {
    "images": [{"id": 1, "file_name": "1.png", "source": "a"}],
    "annotations": [{"image_id": 1, "id": 1, "caption": "a cat"}],
}


def coco(**lists):
    return lambda folder: document(folder, "a.json", COCO | lists)


def saved_with_indices(folder):
    name = saved(folder, "saved", {"": [ROW]})
    state = json.loads((folder / name / "state.json").read_text())
    (folder / name / "state.json").write_text(
        json.dumps(state | {"_indices_data_files": [{"filename": "i.arrow"}]})
    )
    return name


def saved_without_a_file(folder):
    name = saved(folder, "saved", {"": [ROW]})
    next((folder / name).glob("*.arrow")).unlink()
    return name


def in_folder(*rows):
    return lambda folder: lines(folder, "set/metadata.jsonl", *rows) and "set"


def members(*names):
    return lambda folder: tar(folder, "a.tar", [(name, json.dumps(ROW)) for name in names])


ONE_CLASS = {"_type": "ClassLabel", "names": ["a"]}
NEVER_DROPPED = {
    "an entry that says otherwise than what it refers to": (
        coco(annotations=[COCO["annotations"][0] | {"source": "b"}]),
        r"annotations 1: 'source' is 'b', but of images 'a'",
    ),
    "two images of one id": (coco(images=COCO["images"] * 2), "two entries of images have the id 1"),
    "an image without id": (
        coco(images=[*COCO["images"], {"file_name": "x"}]),
        "entry 2 of images has no 'id'",
    ),
    "a column twice": (
        lambda f: table(f, "a.csv", ["image", "text", "text"]),
        "'text' is in .* more than once",
    ),
    "a column without name": (
        lambda f: table(f, "a.csv", ["", "question", "answer"], ["7", "What?", "A."]),
        "has no name and holds '7', not 0",
    ),
    "a column without name behind": (lambda f: table(f, "a.csv", ["image", "text", ""]), "has no name"),
    "a delimiter that cannot be told": (
        lambda f: text(f, "a.csv", "a,b;c\n1;2,3\n"),
        "cannot tell which of",
    ),
    "a member twice": (members("1.json", "1.json"), "'1.json' comes twice, at byte 1024"),
    "a sample in two places": (
        members("1.json", "2.json", "1.txt"),
        "'1' comes twice, at byte 2048, not in sequence",
    ),
    "two members that say one thing": (
        lambda f: tar(f, "a.tar", [("1.json", json.dumps(ROW)), ("1.answer", "A dog.")]),
        "'answer' is given by two members",
    ),
    "a member without ending": (members("LICENSE"), "'LICENSE' at byte 0 has no base name and ending"),
    "an unknown member": (members("1.foo"), r"its member \.foo is not known"),
    "two images of an imagefolder's row": (
        in_folder({"file_names": ["1.png"], "image_file_names": ["2.png"], "text": "a cat"}),
        "more than once, under",
    ),
    "two names of files": (
        in_folder({"left_file_name": "1.png", "right_file_name": "2.png"}),
        "in which order",
    ),
    "rows kept in another order": (saved_with_indices, r"flatten_indices\(\)"),
    "a saved file that is gone": (saved_without_a_file, "lacks 'data-00000-of-00001.arrow'"),
    "a class that has no name": (
        lambda f: parquet(f, "a.parquet", {"label": 2}, features={"label": ONE_CLASS}),
        "label is 2; wanted the number of one of 1 classes",
    ),
    "a split of one": (lambda f: saved(f, "saved", {"": [ROW]}) + ":train", "is one split, found 'train'"),
    "a split of rows that name none": (lambda f: lines(f, "a.jsonl", ROW) + ":train", "names no split"),
    "a split that no row is of": (
        lambda f: lines(f, "a.jsonl", ROW | {"split": "train"}) + ":test",
        r"no row is of the split 'test'; found \['train'\]",
    ),
}


@pytest.mark.parametrize("case", NEVER_DROPPED)
def test_nothing_is_dropped_or_guessed(tmp_path, case):
    write, message = NEVER_DROPPED[case]
    with pytest.raises(DataError, match=message):
        load_records(tmp_path / write(tmp_path))

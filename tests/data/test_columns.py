"""A user's own mapping of columns: what it may say, what rows suggest, and what is told of what was left aside."""

import json

import pytest

from mmpeft.data.layouts.columns import Columns, propose_columns
from mmpeft.data.layouts.notes import Notes
from mmpeft.data.sources import DataError, load_records
from mmpeft.errors import RefusedError

ASKED = {"question": "What?", "answer": "A cat."}


@pytest.fixture
def write(tmp_path):
    def run(*rows, name="data.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / name

    return run


@pytest.mark.parametrize(
    ("mapping", "ignored", "told"),
    [
        ({"imagee": "x"}, [], "maps 'imagee', which no row is read by; the closest is 'image'"),
        ({"image": "x", "answer": "x"}, [], "the column 'x' twice"),
        ({"image": "x"}, ["x"], "gives image the column 'x'; wanted one that is not ignored"),
        ({"image": 3}, [], "the column 3"),
    ],
)
def test_impossible_mappings_are_refused_at_once(mapping, ignored, told):
    with pytest.raises(RefusedError, match=told):
        Columns(mapping, ignored)


def test_a_column_that_no_row_has_is_refused_and_one_of_some_rows_is_not(write):
    path = write({"asks": "What?", "answer": "A cat."}, ASKED)
    with pytest.raises(RefusedError, match=r"maps \['says'\], which no row of .*data\.jsonl has"):
        load_records(path, Columns({"question": "asks", "answer": "says"}))
    records = load_records(path, Columns({"question": "asks"}))
    assert [record["turns"] for record in records] == [[("What?", "A cat.")]] * 2


def test_what_was_left_aside_is_counted(write):
    notes = Notes()
    rows = [
        {**ASKED, "source": "web", "note": "x"},
        {**ASKED, "source": "web"},
        {"question": "What?", "answers": ["", "red", " "]},
        {"question": "What?"},
    ]
    path = write(*rows)
    records = load_records(path, Columns(ignored=["note"]), on_bad_sample="skip", notes=notes)
    assert len(records) == 3
    assert notes.lines() == [
        "keys that change no sample, set aside: source (2)",
        "keys left out by data.ignore: note (1)",
        "2 empty answers among several people's, left out",
        "1 bad rows skipped (data.on_bad_sample): not valid, the first: data.jsonl:4: the last question has no answer; "
        "add it (only prediction takes rows without)",
    ]
    with pytest.raises(DataError, match=r"1 problem\(s\)"):
        load_records(path, Columns(ignored=["note"]))


def test_a_file_of_bad_rows_alone_is_an_error_also_where_they_are_skipped(write):
    with pytest.raises(DataError, match=r"2 problem\(s\)"):
        load_records(write({"question": "What?"}, {"question": ""}), on_bad_sample="skip")


@pytest.mark.parametrize(
    ("rows", "proposed"),
    [
        ([{"image": "a.png", **ASKED}], {}),
        ([{"img_name": "a.png", "query": "What?", "label": "A cat."}],
         {"image": "img_name", "question": "query"}),
        ([{"photo": "a.png", **ASKED}], {"image": "photo"}),
        ([{"photo": {"bytes": b"x", "path": None}, "qestion": "What?", "anwser": "x"}],
         {"image": "photo", "question": "qestion", "answer": "anwser"}),
        ([{"image": None, **ASKED}, {"image": "a.png", "reponse": "x"}], {}),
        ([{"shots": ["a.png", "b.png"], "text": "A cat."}], {"image": "shots"}),
        ([{"alpha": 1, "beta": 2}], {}),
    ],
)  # fmt: skip
def test_the_mapping_that_rows_suggest(rows, proposed):
    assert propose_columns(rows) == proposed
    Columns(proposed)


def test_a_proposed_mapping_reads_the_rows(write):
    rows = [{"photo": "a.png", "qestion": "What?", "anwser": "A cat."}]
    (record,) = load_records(write(*rows), Columns(propose_columns(rows)))
    assert record["turns"] == [("<image>What?", "A cat.")]


def test_ids_of_images_repeat_and_are_counted_on(write, tmp_path):
    asked = [
        {"id": "7", "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "x"}]}
    ]
    path = write(*asked * 3, {"id": "7#2", **ASKED})
    with pytest.raises(DataError, match=r"data\.jsonl:4 \(id '7#2'\): the id is also used at data\.jsonl:2"):
        load_records(path)
    records = load_records(write(*asked * 3, {"id": "8", **ASKED}))
    assert [record["id"] for record in records] == ["7", "7#2", "7#3", "8"]
    named = {"id": "441147", "image": "COCO_000441147.jpg", **ASKED}
    assert [record["id"] for record in load_records(write(named, named))] == ["441147", "441147#2"]
    with pytest.raises(DataError, match="the id is also used"):
        load_records(write({"id": "x", "image": "a.png", **ASKED}, {"id": "x", "image": "a.png", **ASKED}))


def test_source_beside_a_mapped_target_is_no_bookkeeping(write):
    row = {"instruction": "To German.", "source": "cat", "target": "Katze"}
    with pytest.raises(DataError, match="the key 'source'"):
        load_records(write(row), Columns({"answer": "target"}))
    (record,) = load_records(write(row), Columns({"answer": "target", "input": "source"}))
    assert record["turns"] == [("To German.\ncat", "Katze")]

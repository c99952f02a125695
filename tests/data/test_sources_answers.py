"""Choices and several people's answers: what a record holds of them, and which rows are refused."""

import json

import pyarrow
import pytest
from pyarrow import parquet

from mmpeft.data.sources import DataError, load_records
from mmpeft.metrics.vqa import vqa_score


@pytest.fixture
def load(tmp_path):
    """Writes one row as JSONL and reads it back."""

    def run(require_answers=True, **row):
        path = tmp_path / "data.jsonl"
        path.write_text("\n" + json.dumps({"id": "q7", **row}) + "\n")
        (record,) = load_records(path, require_answers=require_answers)
        return record

    return run


@pytest.fixture
def refuse(load):
    def run(message, **row):
        with pytest.raises(DataError, match=message) as caught:
            load(**row)
        assert "data.jsonl:2 (id 'q7'): " in str(caught.value)

    return run


def conversation(*values):
    speakers = ("human", "gpt")
    return [{"from": speakers[number % 2], "value": value} for number, value in enumerate(values)]


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (["red"], "wanted two or more"),
        (["red", " "], r"choice 2 of .* is empty"),
        (["red", "blue", "red\n"], "the choice 'red' is given twice"),
        (["Red", "blue"], "the answer 'red' is not among the choices"),
        ("red", "choices is str"),
    ],
)
def test_refused_choices(refuse, choices, message):
    refuse(message, question="What?", answer="red", choices=choices)


def test_choices_are_kept_as_written_and_compared_trimmed(load):
    assert load(question="What?", answer="red ", choices=[" red", "blue"])["choices"] == [" red", "blue"]


def test_choices_are_those_of_the_last_turn(load, refuse):
    turns = conversation("Shape?", "circle", "Colour?", "red")
    assert load(conversations=turns, choices=["red", "blue"])["choices"] == ["red", "blue"]
    refuse("the answer 'red' is not among", conversations=turns, choices=["circle", "square"])


def test_choices_without_an_answer_are_fine_for_prediction(load):
    record = load(question="What?", choices=["red", "blue"], require_answers=False)
    assert (record["choices"], record["turns"]) == (["red", "blue"], [("What?", None)])
    with pytest.raises(DataError, match="wanted two or more"):
        load(question="What?", choices=["red"], require_answers=False)


@pytest.mark.parametrize(
    ("row", "answer", "references"),
    [
        ({"answers": ["red", "blue", "blue"]}, "blue", ["blue", "red", "blue"]),
        ({"answers": ["red", "blue"]}, "red", ["red", "blue"]),
        (
            {"answers": ["red", "blue ", "red", "blue", "blue"]},
            "blue ",
            ["blue ", "red", "red", "blue", "blue"],
        ),
        ({"answers": ["red", "blue", "blue"], "answer": "red"}, "red", ["red", "blue", "blue"]),
        ({"answers": ["blue", "red "], "answer": "red"}, "red", ["red", "blue"]),
        ({"answers": ["blue", "navy"], "answer": "red"}, "red", ["red", "blue", "navy"]),
        ({"answers": [{"answer": "two", "answer_id": 1}, {"answer": "2"}]}, "two", ["two", "2"]),
    ],
)
def test_references_and_the_answer_that_is_learnt(load, row, answer, references):
    record = load(question="What?", **row)
    assert record["turns"] == [("What?", answer)]
    assert record["references"] == references


def test_an_answer_that_people_spell_otherwise_is_no_further_person(load):
    people = ["no"] * 7 + ["Yes"] * 3
    record = load(image="a.png", question="Is it?", answer="yes", answers=people)
    assert (record["turns"][-1][1], sorted(record["references"])) == ("yes", sorted(people))
    assert vqa_score("yes", record["references"]) == pytest.approx(0.9)


def test_references_beside_conversations_and_captions(load):
    turns = conversation("Shape?", "circle", "Colour?")
    record = load(conversations=turns, answers=["red", "blue", "red"])
    assert record["turns"] == [("Shape?", "circle"), ("Colour?", "red")]
    assert load(image="a.png", text="A cat.", answers=["A cat.", "One cat."])["references"] == [
        "A cat.",
        "One cat.",
    ]
    assert "references" not in load(question="What?", answer="red")


def test_prediction_rows_may_bring_references(load):
    assert load(question="What?", answers=["red"], require_answers=False)["turns"] == [("What?", "red")]


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([], "answers is list"),
        ("['red' 'blue']", "answers is str"),
        (["red", True], "answers is True; wanted text"),
        ([{"said": "red"}], "answers holds no text"),
        (["", " "], "answers holds no text"),
        (["<image>", "<image>"], "the answers hold <image>"),
    ],
)
def test_refused_answers(refuse, answers, message):
    refuse(message, question="What?", answers=answers)


def test_the_most_frequent_answer_is_checked_against_the_choices(load, refuse):
    assert load(question="What?", answers=["red", "red"], choices=["red", "blue"])["choices"] == [
        "red",
        "blue",
    ]
    refuse("the answer 'red' is not among", question="What?", answers=["red"], choices=["green", "blue"])


def test_answers_and_choices_in_parquet(tmp_path):
    people = [{"answer": "red", "answer_id": 1}, {"answer": "blue", "answer_id": 2}]
    rows = [{"question": "What?", "answers": people, "choices": ["red", "blue"]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (record,) = load_records(tmp_path / "a.parquet")
    assert (record["references"], record["choices"]) == (["red", "blue"], ["red", "blue"])

"""Choices that questions are known to have: closed sets of a task or a question, bounded, and what people type."""

import pytest

from mmpeft.data.choices import MOST, choices_of, known_choices, read_choices
from tests.tiny import make_record

COLOURS, SHAPES = ["red", "blue"], ["circle", "square"]


def rows(*pairs, task="vqa"):
    """Records of (question, choices)."""
    return [make_record(q, None, task=task, **({"choices": c} if c else {})) for q, c in pairs]


def known_of(records, question, task="vqa"):
    return choices_of(known_choices(records), make_record(question, None, task=task))


def test_a_set_that_a_whole_task_shares_is_any_questions():
    listed = rows(("what color?", COLOURS), ("which color is it?", ["blue ", "red"]))
    assert known_choices(listed) == {"vqa": {"": COLOURS}}
    assert known_of(listed, "never asked") == COLOURS
    assert known_of(listed, "what color?", task="caption") == []
    assert known_of(rows(("what color?", COLOURS), task=None), "what?", task=None) == COLOURS


def test_other_sets_belong_to_their_questions():
    listed = rows(("<image>what color?", COLOURS), ("what shape?", SHAPES), ("is it red?", None))
    assert known_of(listed, "what color?") == COLOURS
    assert known_of(listed, " what shape? ") == SHAPES
    assert known_of(listed, "is it red?") == [], "which is learnt by writing"
    assert known_of(listed, "how large is it?") is None


def test_a_question_whose_rows_differ_has_no_known_choices():
    listed = rows(("what is it?", COLOURS), ("what is it?", SHAPES), ("what color?", COLOURS))
    assert known_of(listed, "what is it?") is None
    assert known_of(listed, "what color?") == COLOURS
    assert known_of(rows(("what?", COLOURS), ("what?", None)), "what?") is None


def test_data_without_choices_is_known_for_none():
    assert known_choices(rows(("what?", None))) == {}


def test_what_is_kept_is_bounded():
    many = [str(number) for number in range(MOST + 1)]
    assert known_of(rows(("what?", many[:-1])), "what?") == many[:-1]
    assert known_choices(rows(("what?", many))) == {"vqa": {}}
    questions = rows(*((f"what {number}?", [number, f"not {number}"]) for number in many))
    assert known_of(questions[:-1], "what 0?") == ["0", "not 0"]
    assert known_choices(questions) == {"vqa": {}}


@pytest.mark.parametrize(
    ("text", "choices"),
    [
        ("red,green, blue ", ["red", "green", "blue"]),
        ("[red, yes]", ["red", "yes"]),
        ('"red, or so", 1', ["red, or so", "1"]),
        ("red", ["red"]),
        ("red\ngreen,\r\0", ["red", "green", "", "\0"]),
        ("red,", ["red", ""]),
        ("", []),
    ],
)
def test_choices_as_people_type_them(text, choices):
    assert read_choices(text) == choices

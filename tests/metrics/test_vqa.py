"""VQA accuracy against values worked out by hand and against the examples of its published rules."""

import pytest

from mmpeft.metrics.vqa import CONTRACTIONS, REPAIRED, normalise, vqa_score


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("dont", "don't"),  # the examples of visualqa.org/evaluation
        ("girl's", "girl's"),
        ("2:50 pm", "2:50 pm"),
        ("100,978", "100978"),
        ("The Cat", "cat"),
        ("an apple and a pear", "apple and pear"),
        ("two", "2"),
        ("None", "0"),
        ("Ten dogs", "10 dogs"),
        ("eleven", "eleven"),
        ("yes.", "yes"),
        ("2.5", "2.5"),
        ("3.", "3"),
        ("U.S.A.", "usa"),
        ("red-haired", "red haired"),
        ("red - haired", "red haired"),  # a mark beside a space goes without leaving one
        ("yes, sir", "yes sir"),
        ("black/white", "black white"),
        ("1,000-2,000", "10002000"),  # with a comma between digits every mark goes without leaving a space
        ("yes!?", "yes"),
        ("line\none\t", "line 1"),
        ("couldntve", "couldntve"),  # two apostrophes lost: not in the table
        ("couldnt've", "couldn't've"),
        ("twas", "'twas"),
        ("yall'd've", "y'all'd've"),
        ("Im", "im"),
        ("", ""),
        *((text, "") for text in ("A", "The.", "an a", "?", "- ;")),  # nothing is left
    ],
)
def test_normalisation(text, wanted):
    assert normalise(text) == wanted


def test_every_contraction_is_repaired_and_then_left_alone():
    assert len(REPAIRED) == 120 - 4 - 2  # the published table without 4 in capitals and 2 that change nothing
    for word in CONTRACTIONS.split():
        assert normalise(word) == word
        assert normalise(word.replace("'", "", 1)) == word


@pytest.mark.parametrize(
    ("agreeing", "wanted"),
    # Of ten people k gave the answer: k times k - 1 of the others agree, 10 - k times k do.
    [(0, 0), (1, 9 / 30), (2, (2 * 1 + 8 * 2) / 30), (3, (3 * 2 + 7 * 3) / 30), (4, 1), (10, 1)],
)
def test_ten_people(agreeing, wanted):
    references = ["yes"] * agreeing + [f"no {number}" for number in range(10 - agreeing)]
    assert vqa_score("yes", references) == pytest.approx(wanted, abs=1e-12)


def test_predictions_and_references_are_both_normalised():
    assert vqa_score("The two!", ["2", "two", "a two", "2."]) == 1
    assert vqa_score("Yes", ["yes"] * 10) == 1  # also where the people agree


def test_of_fewer_than_four_people_no_answer_is_wholly_right():
    assert vqa_score("yes", ["yes"] * 3) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="several"):
        vqa_score("yes", ["yes"])


@pytest.mark.parametrize("prediction", ["", " \n", "A", "a", "The", "?", "the a", "a!"])
@pytest.mark.parametrize("reference", ["", "A", "a", "the", "?", "yes"])
def test_an_answer_that_the_rules_leave_nothing_of_is_worth_nothing(prediction, reference):
    """The same one as people gave is not right either: the rules cannot tell it from silence."""
    assert vqa_score(prediction, [reference] * 10) == 0
    assert vqa_score("yes", [reference] * 10) == (reference == "yes")


def test_who_says_nothing_agrees_with_nobody():
    references = [""] * 6 + ["yes"] * 4
    assert [vqa_score(said, references) for said in ("", " \n", "yes")] == [0, 0, 1]

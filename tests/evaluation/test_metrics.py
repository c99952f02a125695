"""Scores of answers."""

import pytest

from mmpeft.evaluation.metrics import accuracy, exact_match


@pytest.mark.parametrize(
    ("prediction", "truth", "right"),
    [("blue", "blue", 1), (" blue\n", "blue", 1), ("", " ", 1), ("Blue", "blue", 0), ("blue.", "blue", 0)],
)
def test_exact_match_trims_white_space_only(prediction, truth, right):
    assert exact_match(prediction, truth) is bool(right)


def test_accuracy():
    assert accuracy([("a", "a"), ("b", "a"), ("c", "c "), ("", "d")]) == 0.5
    with pytest.raises(ValueError, match="at least one"):
        accuracy([])

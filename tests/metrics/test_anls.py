"""ANLS against values worked out by hand from the definition, and its distance against torchmetrics'."""

import random

import pytest
from torchmetrics.functional.text import edit_distance

from mmpeft.metrics.anls import anls_score, levenshtein


@pytest.mark.parametrize("seed", range(20))
def test_the_distance_equals_torchmetrics(seed):
    generator = random.Random(seed)
    first, second = ("".join(generator.choices("abcé ", k=generator.randint(0, 12))) for _ in range(2))
    assert levenshtein(first, second) == edit_distance(first, second, reduction="sum").item()


@pytest.mark.parametrize(
    ("prediction", "references", "wanted"),
    [
        ("ITC Limited", ["itc limited"], 1),
        ("  itc\n limited ", ["ITC  Limited"], 1),
        ("itc limitd", ["itc limited"], 10 / 11),
        ("12.", ["12"], 2 / 3),
        ("$ 1,200", ["1,200", "$1,200"], 6 / 7),  # the nearest reference, wherever it stands
        ("$ 1,200", ["$1,200", "1,200"], 6 / 7),
        ("2013", ["2014"], 3 / 4),
        ("13", ["12"], 0),  # half of it is other: 0 by the definition, 0.5 in some code
        ("abcdefg", ["abcdxyz"], 4 / 7),
        ("abcdefg", ["abcxxyz"], 0),  # 4 of 7
        ("", ["yes"], 0),
        ("yes", [""], 0),
        ("the answer is yes", ["yes"], 0),
        ("Straße", ["straße"], 1),
    ],
)
def test_by_hand(prediction, references, wanted):
    assert anls_score(prediction, references) == pytest.approx(wanted, abs=1e-12)

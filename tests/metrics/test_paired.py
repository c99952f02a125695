"""The paired comparison: its tests by published figures and by enumeration, its power by simulation."""

import math
from itertools import product

import numpy as np
import pytest

from mmpeft.metrics import intervals, paired
from mmpeft.metrics.paired import compare_scores, mcnemar, sign_flip


def test_mcnemar_is_the_binomial_test_of_the_pairs_that_differ():
    """The figures are R's `binom.test(b, b + c)$p.value`."""
    assert mcnemar(8, 2) == pytest.approx(0.109375)
    assert mcnemar(2, 8) == pytest.approx(0.109375)
    assert mcnemar(15, 5) == pytest.approx(0.04138947, abs=1e-8)
    assert mcnemar(5, 5) == mcnemar(0, 0) == 1
    assert mcnemar(10, 0) == 2 / 2**10


def test_flipped_signs_of_alike_differences_are_mcnemars_test():
    differences = np.array([1.0] * 8 + [-1.0] * 2 + [0.0] * 50)
    flips = np.array(list(product((-1, 1), repeat=10)))
    wanted = (np.abs(flips.sum(1)) >= 6).mean()
    assert sign_flip(differences) == (pytest.approx(wanted), "McNemar, exact")


def test_all_flips_of_few_clusters_are_tried_and_of_many_some():
    few = np.array([3.0, 1.0, 2.0, -1.0])
    sums = [abs(np.dot(signs, few)) for signs in product((-1, 1), repeat=4)]
    assert sign_flip(few) == (sum(own >= 5 for own in sums) / 16, "sign flips of clusters, all")
    many = np.tile(few, 6)
    p_value, test = sign_flip(many)
    assert "drawn" in test
    deviation = 30 / math.sqrt((many**2).sum())
    assert p_value == pytest.approx(math.erfc(deviation / math.sqrt(2)), abs=0.01)
    assert sign_flip(np.zeros(3)) == (1.0, "no difference")


def test_questions_about_one_image_are_one():
    """Twenty questions, all alike better, about two images: no more than two pairs."""
    first, second = [0.0] * 20 + [1.0] * 20, [1.0] * 20 + [1.0] * 20
    apart = compare_scores(first, second, range(40))
    together = compare_scores(first, second, [number // 10 for number in range(40)])
    assert apart.difference == together.difference == 0.5
    assert apart.p_value == 2 / 2**20
    assert together.p_value == 2 / 2**2
    assert (apart.better, apart.worse, apart.questions, apart.clusters) == (20, 0, 40, 40)
    assert together.clusters == 4
    assert together.standard_error > 2 * apart.standard_error


def test_effect_with_interval_and_standard_error():
    random = np.random.default_rng(0)
    first = random.random(500)
    second = first + random.normal(0.1, 0.5, 500)
    found = compare_scores(first, second, range(500))
    error = np.std(second - first, ddof=1) / math.sqrt(500)
    assert found.difference == pytest.approx((second - first).mean())
    assert found.standard_error == pytest.approx(error, rel=1e-6)
    assert found.interval == pytest.approx(
        (found.difference - 1.96 * error, found.difference + 1.96 * error), abs=0.006
    )


def test_so_many_questions_as_it_says_find_the_difference_four_times_of_five(monkeypatch):
    monkeypatch.setattr(intervals, "DRAWS", 100)
    random = np.random.default_rng(5)

    def draw(number):
        first = (random.random(number) < 0.6).astype(float)
        flipped = random.random(number)
        return first, np.where(flipped < 0.2, 1.0, np.where(flipped > 0.95, 0.0, first))

    found = compare_scores(*draw(40_000), range(40_000))
    needed = found.needed
    assert needed is not None
    p_values = [compare_scores(*draw(needed), range(needed)).p_value for _ in range(200)]
    assert 0.68 < np.mean(np.array(p_values) < 0.05) < 0.9
    detectable = compare_scores(*draw(needed), range(needed)).detectable
    assert detectable == pytest.approx(abs(found.difference), rel=0.35)


def test_no_difference_needs_no_number():
    found = compare_scores([1.0, 0.0], [1.0, 0.0], range(2))
    assert (found.needed, found.p_value, found.interval) == (None, 1.0, (0.0, 0.0))
    assert compare_scores([1.0], [0.0], [0]).interval is None


def test_many_pairs_are_tested_at_once_and_as_exactly():
    """Sums of binomial coefficients as integers, and R's `binom.test(100000, 201000)$p.value`."""
    for better, worse in ((700, 611), (3, 1), (1000, 1), (0, 300), (255, 255)):
        number = better + worse
        tail = sum(math.comb(number, few) for few in range(min(better, worse) + 1))
        assert mcnemar(better, worse) == pytest.approx(min(1.0, 2 * tail / 2**number), rel=1e-9)
    z = 999 / math.sqrt(201_000)  # with the correction for continuity
    assert mcnemar(100_000, 101_000) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=1e-4)
    assert mcnemar(1_000_000, 900_000) < 1e-300


def test_signs_of_many_clusters_are_flipped_in_parts(monkeypatch):
    many = np.tile([3.0, 1.0, 2.0, -1.0], 10)
    whole = sign_flip(many)
    monkeypatch.setattr(paired, "MOST_SIGNS", 7 * 40)
    assert sign_flip(many) == whole


@pytest.mark.parametrize(
    ("first", "second", "clusters"),
    [([0.0], [1.0], [0]), ([0.0] * 6, [1.0] * 5 + [0.0], [0] * 6), ([0.0] * 5, [1.0] * 5, range(5))],
)
def test_what_does_not_vary_tells_nothing_of_other_questions(first, second, clusters):
    """One question, one image, or five questions that all became better: no interval, and no number that it takes."""
    found = compare_scores(first, second, clusters)
    assert (found.standard_error, found.detectable, found.needed, found.interval) == (None,) * 4
    same = compare_scores(first, first, clusters)
    assert (same.difference, same.detectable, same.needed) == (0, None, None)

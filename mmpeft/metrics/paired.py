"""Two models on the same questions: the difference, its interval, a paired test, and how many questions it would take.

The test flips signs: were the two alike, either could have given either answer to all questions of a cluster. Where the
differences of the clusters are all equally large, as of right and wrong answers to one question an image, that is
McNemar's exact test.

Source: McNemar 1947; Good 2005, "Permutation, Parametric and Bootstrap Tests of Hypotheses", section 3.6; clustered
standard errors and power: Miller 2024, "Adding Error Bars to Evals", sections 2.2, 4.2 and 5.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import NormalDist

import numpy as np

from mmpeft.metrics.intervals import SEED, Interval, cluster_sums, draw, percentiles
from mmpeft.metrics.sums import Numbers, mean_of

MOST_ENUMERATED, FLIPS = 14, 20_000
"""Clusters whose signs are flipped in every way; ways that are drawn where there are more."""
MOST_SIGNS = 4_000_000
"""In memory together."""
POWER, LEVEL = 0.8, 0.05
REACH = NormalDist().inv_cdf(1 - LEVEL / 2) + NormalDist().inv_cdf(POWER)
"""Standard errors that a difference must be away from 0 to be found with this power at this level: 2.80."""
ROUNDING, NEGLIGIBLE = 1e-9, 1e-18


@dataclass(frozen=True)
class Comparison:
    """Of scores of the same questions; differences are the second's less the first's."""

    first: float
    """Mean score."""
    second: float
    difference: float
    interval: Interval | None
    """95 %, of the difference; None of fewer than two clusters, and where all have the same one, above or below 0."""
    p_value: float
    """Two-sided."""
    test: str
    better: int
    """Questions of which the second's score is higher."""
    worse: int
    questions: int
    clusters: int
    standard_error: float | None
    """Of the difference, clustered; None where no cluster differs from another, of which nothing can be reckoned."""

    @property
    def detectable(self) -> float | None:
        """The difference that so many questions would show in four of five such comparisons; None where the spread of
        differences is not known."""
        return None if self.standard_error is None else REACH * self.standard_error

    @property
    def needed(self) -> int | None:
        """How many questions of this kind would show a difference as large as this one with a power of 80 %; None
        where there is none, or the spread of differences is not known."""
        if not self.difference or self.detectable is None:
            return None
        return math.ceil(self.questions * (self.detectable / self.difference) ** 2 - ROUNDING)


def compare_scores(
    first: Sequence[float], second: Sequence[float], clusters: Sequence[Hashable]
) -> Comparison:
    """Compares two models.

    Args:
        first, second: scores of the same questions, in the same order.
        clusters: of every question, what it shares with those that it depends on, such as its image.
    """
    differences = np.asarray(second, float) - np.asarray(first, float)
    sums, number = mean_of(differences.tolist(), are_shares=False), len(differences)
    totals = cluster_sums(sums.rows, clusters)
    mean = float(differences.mean())
    p_value, test = sign_flip(totals[:, 0])
    residuals = totals[:, 0] - mean * totals[:, 1]
    differ = len(totals) > 1 and float(np.abs(residuals).max()) > ROUNDING
    error = (
        math.sqrt(len(totals) / (len(totals) - 1) * float(residuals @ residuals)) / number if differ else None
    )
    # of a few questions that all differ alike, draws that cannot differ either would tell a certainty that is not there
    told = differ or (len(totals) > 1 and not mean)
    interval = percentiles(sums.values(draw(sums.rows, clusters))[""]) if told else None
    return Comparison(
        *(float(np.mean(first)), float(np.mean(second)), mean),
        *(interval, p_value, test),
        *(int((differences > 0).sum()), int((differences < 0).sum()), number, len(totals), error),
    )


def sign_flip(differences: Numbers) -> tuple[float, str]:
    """The two-sided p-value of a sum of differences, each of which could as well have the other sign, and the test.

    Args:
        differences: (clusters,)
    """
    moved = differences[np.abs(differences) > ROUNDING]
    if not len(moved):
        return 1.0, "no difference"
    if np.ptp(np.abs(moved)) < ROUNDING:
        return mcnemar(int((moved > 0).sum()), int((moved < 0).sum())), "McNemar, exact"
    seen = abs(moved.sum()) - ROUNDING * max(1.0, float(np.abs(moved).sum()))
    if len(moved) <= MOST_ENUMERATED:
        signs = np.array(list(product((-1, 1), repeat=len(moved))))
        return float((np.abs(signs @ moved) >= seen).mean()), "sign flips of clusters, all"
    generator = np.random.default_rng(SEED)
    at_once = min(FLIPS, max(1, MOST_SIGNS // len(moved)))
    more = 0
    for begun in range(0, FLIPS, at_once):
        signs = generator.choice((-1, 1), (min(at_once, FLIPS - begun), len(moved)))
        more += int((np.abs(signs @ moved) >= seen).sum())
    return (more + 1) / (FLIPS + 1), f"sign flips of clusters, {FLIPS:,} drawn"


def mcnemar(better: int, worse: int) -> float:
    """McNemar's exact two-sided test: the binomial one of the pairs that differ."""
    number, few = better + worse, min(better, worse)
    logs = math.lgamma(number + 1) - math.lgamma(few + 1) - math.lgamma(number - few + 1)
    # from the largest down, each in shares of it: integers would have as many bits as pairs
    term, tail = 1.0, 0.0
    while few >= 0 and term > NEGLIGIBLE:
        tail += term
        term *= few / (number - few + 1)
        few -= 1
    return min(1.0, tail * math.exp2(1 - number + logs / math.log(2)))

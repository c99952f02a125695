"""Calibration error (ECE) and Brier score: whether ranked answers are as often right as they are sure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mmpeft.errors import RefusedError
from mmpeft.metrics.answer import Answer
from mmpeft.metrics.sums import Numbers, Sums

NUM_BINS = 15
"""Of Guo et al. 2017, "On Calibration of Modern Neural Networks"."""


@dataclass
class Bin:
    """The answers whose confidence lies in (low, high]."""

    low: float
    high: float
    count: int
    confidence: float
    """Their mean confidence, 0..1."""
    accuracy: float
    """Which share of them is right, 0..1."""


def probabilities(answer: Answer) -> list[float]:
    """The softmax over the scores of the row's choices; its largest is the confidence.

    Raises:
        RefusedError: the row has no scores, or its truth is none of its choices.
    """
    if missing := lacks_scores(answer):
        raise RefusedError(f"{answer.row}: {missing}")
    return softmax(answer.scores or [])


def softmax(scores: Sequence[float]) -> list[float]:
    """exp(score) of each as a share of their sum."""
    highest = max(scores)
    weights = [math.exp(score - highest) for score in scores]
    return [weight / sum(weights) for weight in weights]


def lacks_scores(answer: Answer) -> str | None:
    """What a row lacks for these metrics, in words; None if nothing."""
    if not answer.choices or not answer.scores:
        return "it has no choices with scores; rank its choices"
    if answer.truth not in _stripped(answer):
        return f"its truth {answer.truth!r} is none of its choices {answer.choices}"
    return None


def reliability(answers: Sequence[Answer], num_bins: int = NUM_BINS) -> list[Bin]:
    """The answers in equal bins of confidence, empty ones left out.

    An answer is the choice with the highest score (of equal ones the first) and right if it is the first
    reference.
    """
    groups: dict[int, list[tuple[float, bool]]] = {}
    for answer in answers:
        place, confidence, right = _sureness(answer, num_bins)
        groups.setdefault(place, []).append((confidence, right))
    return [
        Bin(
            place / num_bins,
            (place + 1) / num_bins,
            len(group),
            sum(confidence for confidence, _ in group) / len(group),
            sum(right for _, right in group) / len(group),
        )
        for place, group in sorted(groups.items())
    ]


def calibration_error(answers: Sequence[Answer]) -> float:
    """Expected calibration error, 0..1: `mean_gap` of NUM_BINS bins."""
    return mean_gap(reliability(answers))


def calibration_sums(answers: Sequence[Answer]) -> Sums:
    """`calibration_error` as a function of the sums of confidence and right answers of each bin."""
    import numpy as np

    rows = np.zeros((len(answers), 3, NUM_BINS))
    for row, answer in enumerate(answers):
        place, confidence, right = _sureness(answer, NUM_BINS)
        rows[row, :, place] = 1, confidence, right

    def values(sums: Numbers) -> dict[str, Numbers]:
        counts, confidence, right = sums.reshape(len(sums), 3, NUM_BINS).transpose(1, 0, 2)
        return {"": np.abs(right - confidence).sum(1) / counts.sum(1)}

    return Sums(rows.reshape(len(answers), -1), values)


def _sureness(answer: Answer, num_bins: int) -> tuple[int, float, bool]:
    """Its bin, its confidence, and whether it is right."""
    shares = probabilities(answer)
    confidence = max(shares)
    right = _stripped(answer)[shares.index(confidence)] == answer.truth
    return min(math.ceil(confidence * num_bins), num_bins) - 1, confidence, right


def mean_gap(bins: Sequence[Bin]) -> float:
    """|accuracy - confidence| of a bin, the mean weighted by its answers. Source: Guo et al. 2017, equation 3."""
    gaps = sum(part.count * abs(part.accuracy - part.confidence) for part in bins)
    return gaps / sum(part.count for part in bins)


def brier(answers: Sequence[Answer]) -> float:
    """The mean of `brier_score`, 0..2."""
    return sum(map(brier_score, answers)) / len(answers)


def brier_score(answer: Answer) -> float:
    """The squared distance between probabilities and truth, 0..2.

    Source: Brier 1950, with the sum over a row's choices: (probability - (1 for the truth, else 0))^2.
    """
    pairs = zip(probabilities(answer), _stripped(answer), strict=True)
    return sum((share - (choice == answer.truth)) ** 2 for share, choice in pairs)


def _stripped(answer: Answer) -> list[str]:
    return [choice.strip() for choice in answer.choices or ()]

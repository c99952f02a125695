"""Answers as classes: accuracy, precision, recall, F1 and the confusion matrix.

The labels are the first references and the choices; an answer is a label if it is its text without outer white
space. An answer that is no label is wrong for its truth and counts against no other.
"""

from collections.abc import Callable, Sequence
from typing import Any

from mmpeft.metrics.answer import Answer
from mmpeft.metrics.sums import Numbers, Sums, quotient

MACRO = "macro"
"""The name of the mean over labels. It wins over a label of this name."""


def accuracy(answers: Sequence[Answer]) -> float:
    """The share, 0..1, of answers that are the first reference."""
    return sum(map(is_right, answers)) / len(answers)


def is_right(answer: Answer) -> bool:
    """Whether it is the first reference."""
    return answer.predicted == answer.truth


def confusion(answers: Sequence[Answer]) -> tuple[list[str], list[list[int]]]:
    """The labels in order, and how often which was predicted for which.

    Returns:
        The matrix is (labels, labels + 1): a row is a truth, a column a prediction, and the last column counts
        the predictions that are no label.
    """
    found = {answer.truth for answer in answers}
    found |= {choice.strip() for answer in answers for choice in answer.choices or ()}
    labels = sorted(found)
    places = {label: place for place, label in enumerate(labels)}
    matrix = [[0] * (len(labels) + 1) for _ in labels]
    for answer in answers:
        matrix[places[answer.truth]][places.get(answer.predicted, len(labels))] += 1
    return labels, matrix


Quotient = Callable[[Any, Any, Any], tuple[Any, Any]]
"""Of right, predicted and true answers: what is divided by what."""
QUOTIENTS: dict[str, Quotient] = {
    "precision": lambda right, predicted, true: (right, predicted),
    "recall": lambda right, predicted, true: (right, true),
    "f1": lambda right, predicted, true: (2 * right, predicted + true),
}


def precision(answers: Sequence[Answer]) -> dict[str, float]:
    """Label -> which share of its predictions is right, and their mean as "macro". See `_by_label`."""
    return _by_label(answers, QUOTIENTS["precision"])


def recall(answers: Sequence[Answer]) -> dict[str, float]:
    """Label -> which share of its truths was predicted, and their mean as "macro". See `_by_label`."""
    return _by_label(answers, QUOTIENTS["recall"])


def f1(answers: Sequence[Answer]) -> dict[str, float]:
    """Label -> harmonic mean of precision and recall, and their mean as "macro". See `_by_label`."""
    return _by_label(answers, QUOTIENTS["f1"])


def _by_label(answers: Sequence[Answer], score: Quotient) -> dict[str, float]:
    """A score per label, 0 where it is not defined.

    A label that is neither a truth nor a prediction has none, and none in the mean either, as in torchmetrics.
    """
    labels, matrix = confusion(answers)
    scores = {}
    for place, label in enumerate(labels):
        predicted, true = sum(row[place] for row in matrix), sum(matrix[place])
        if predicted or true:
            above, below = score(matrix[place][place], predicted, true)
            scores[label] = above / below if below else 0.0
    return {**scores, MACRO: sum(scores.values()) / len(scores)}


def sums_by_label(answers: Sequence[Answer], name: str) -> Sums:
    """One of `QUOTIENTS` as a function of how often each label is right, predicted and true."""
    import numpy as np

    labels, _ = confusion(answers)
    predicted, true = (
        np.array([[text == label for label in labels] for text in texts], float)
        for texts in ([answer.predicted for answer in answers], [answer.truth for answer in answers])
    )
    rows = np.stack([predicted * true, predicted, true], axis=1).reshape(len(answers), -1)

    def values(sums: Numbers) -> dict[str, Numbers]:
        right, predicted, true = sums.reshape(len(sums), 3, len(labels)).transpose(1, 0, 2)
        scores = np.where(predicted + true > 0, quotient(*QUOTIENTS[name](right, predicted, true)), np.nan)
        return {**dict(zip(labels, scores.T, strict=True)), MACRO: np.nanmean(scores, axis=1)}

    return Sums(rows, values, are_shares=True)

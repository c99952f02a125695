"""Answers as classes: accuracy, precision, recall, F1 and the confusion matrix.

The labels are the first references and the choices; an answer is a label if it is its text without outer white
space. An answer that is no label is wrong for its truth and counts against no other.
"""

from collections.abc import Callable, Sequence

from mmpeft.metrics.answer import Answer

MACRO = "macro"
"""The name of the mean over labels. It wins over a label of this name."""


def accuracy(answers: Sequence[Answer]) -> float:
    """The share, 0..1, of answers that are the first reference."""
    return sum(answer.predicted == answer.truth for answer in answers) / len(answers)


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


def precision(answers: Sequence[Answer]) -> dict[str, float]:
    """Label -> which share of its predictions is right, and their mean as "macro". See `_by_label`."""
    return _by_label(answers, lambda right, predicted, true: right / predicted if predicted else 0.0)


def recall(answers: Sequence[Answer]) -> dict[str, float]:
    """Label -> which share of its truths was predicted, and their mean as "macro". See `_by_label`."""
    return _by_label(answers, lambda right, predicted, true: right / true if true else 0.0)


def f1(answers: Sequence[Answer]) -> dict[str, float]:
    """Label -> harmonic mean of precision and recall, and their mean as "macro". See `_by_label`."""
    return _by_label(answers, lambda right, predicted, true: 2 * right / (predicted + true))


def _by_label(answers: Sequence[Answer], score: Callable[[int, int, int], float]) -> dict[str, float]:
    """A score (of right, predicted and true answers) per label, 0 where it is not defined.

    A label that is neither a truth nor a prediction has none, and none in the mean either, as in torchmetrics.
    """
    labels, matrix = confusion(answers)
    scores = {}
    for place, label in enumerate(labels):
        predicted, true = sum(row[place] for row in matrix), sum(matrix[place])
        if predicted or true:
            scores[label] = score(matrix[place][place], predicted, true)
    return {**scores, MACRO: sum(scores.values()) / len(scores)}

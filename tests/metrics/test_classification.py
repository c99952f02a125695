"""Scores of classes against torchmetrics, and the confusion matrix."""

import random

import pytest
import torch
from torchmetrics.functional import classification as oracle

from mmpeft.metrics.classification import accuracy, confusion, f1, precision, recall

LABELS = ["blue", "green", "red", "yellow"]
ORACLES = {
    precision: oracle.multiclass_precision,
    recall: oracle.multiclass_recall,
    f1: oracle.multiclass_f1_score,
}


@pytest.fixture
def draw(make):
    """Random answers: (answers, truths, predictions), the last two as numbers of labels."""

    def run(truths, predictions, number=60):
        generator = random.Random(0)
        pairs = [(generator.choice(predictions), generator.choice(truths)) for _ in range(number)]
        numbers = {label: number for number, label in enumerate([*LABELS, "what?"])}
        true, predicted = ([numbers[pair[place]] for pair in pairs] for place in (1, 0))
        answers = make(*[(f" {prediction}", f"{truth}\n") for prediction, truth in pairs])
        return answers, torch.tensor(true), torch.tensor(predicted)

    return run


@pytest.mark.parametrize("score", ORACLES, ids=lambda score: score.__name__)
def test_scores_equal_torchmetrics(draw, score):
    answers, truths, predictions = draw(LABELS, LABELS)
    each = ORACLES[score](predictions, truths, num_classes=4, average=None)
    mean = ORACLES[score](predictions, truths, num_classes=4, average="macro")
    wanted = {**dict(zip(LABELS, each.tolist(), strict=True)), "macro": mean.item()}
    assert score(answers) == pytest.approx(wanted, abs=1e-6)
    share = oracle.multiclass_accuracy(predictions, truths, num_classes=4, average="micro")
    assert accuracy(answers) == pytest.approx(share.item(), abs=1e-6)


@pytest.mark.parametrize("score", ORACLES, ids=lambda score: score.__name__)
def test_a_label_that_never_occurs_has_no_score(draw, score):
    answers, truths, predictions = draw(
        LABELS[:2], LABELS[:3]
    )  # "red" is only predicted, "yellow" only allowed
    for answer in answers:
        answer.choices = LABELS
    each = ORACLES[score](predictions, truths, num_classes=4, average=None)
    mean = ORACLES[score](predictions, truths, num_classes=4, average="macro")
    wanted = {**dict(zip(LABELS[:3], each.tolist()[:3], strict=True)), "macro": mean.item()}
    assert score(answers) == pytest.approx(wanted, abs=1e-6)
    assert wanted["macro"] == pytest.approx(sum(each.tolist()) / 3)  # and so does the oracle


@pytest.mark.parametrize("score", ORACLES, ids=lambda score: score.__name__)
def test_answers_that_are_no_label_count_for_no_label(draw, score):
    answers, truths, predictions = draw(LABELS, [*LABELS, "what?"])
    each = ORACLES[score](predictions, truths, num_classes=5, average=None).tolist()[:4]
    wanted = {**dict(zip(LABELS, each, strict=True)), "macro": sum(each) / 4}
    assert score(answers) == pytest.approx(wanted, abs=1e-6)


def test_confusion_equals_torchmetrics(draw):
    answers, truths, predictions = draw(LABELS, [*LABELS, "what?"])
    labels, matrix = confusion(answers)
    wanted = oracle.multiclass_confusion_matrix(predictions, truths, num_classes=5)
    assert (labels, matrix) == (LABELS, wanted[:4].tolist())
    assert sum(row[-1] for row in matrix) > 0


def test_labels_are_first_references_and_choices(make):
    answers = make(("b", ["a", "b"]), ("d", "c"), choices=[["a ", "e"], None])
    assert confusion(answers) == (["a", "c", "e"], [[0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]])

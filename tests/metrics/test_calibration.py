"""Calibration of ranked answers against torchmetrics and by hand."""

import math

import pytest
import torch
from torchmetrics.functional import mean_squared_error
from torchmetrics.functional.classification import multiclass_calibration_error

from mmpeft.metrics.calibration import brier, calibration_error, mean_gap, probabilities, reliability

CHOICES = ["red", "green", "blue", "yellow"]


@pytest.fixture
def scored(make):
    """Answers with random scores, with those scores as a tensor (rows, choices) and their truths as numbers."""
    generator = torch.Generator().manual_seed(0)
    scores = 2 * torch.randn(300, 4, generator=generator) - 8
    truths = torch.where(torch.rand(300, generator=generator) < 0.5, scores.argmax(1), 0)
    pairs = [("", f" {CHOICES[truth]}") for truth in truths.tolist()]
    return make(*pairs, choices=[CHOICES] * 300, scores=scores.tolist()), scores, truths


def test_calibration_error_equals_torchmetrics(scored):
    answers, scores, truths = scored
    wanted = multiclass_calibration_error(scores.softmax(1), truths, num_classes=4, n_bins=15)
    assert calibration_error(answers) == pytest.approx(wanted.item(), abs=1e-6)
    assert wanted > 0.05


def test_brier_equals_the_mean_squared_error(scored):
    answers, scores, truths = scored
    wanted = 4 * mean_squared_error(scores.softmax(1), torch.nn.functional.one_hot(truths, 4))
    assert brier(answers) == pytest.approx(wanted.item(), abs=1e-6)


def test_bins_by_hand(make):
    # of two choices a confidence c is a distance of log(c / (1 - c))
    sure = [0.8, 0.81, 0.86, 0.55]
    scores = [[math.log(c / (1 - c)), 0.0] for c in sure]
    answers = make(("", "a"), ("", "a"), ("", "b"), ("", "b"), choices=[["a", "b"]] * 4, scores=scores)
    low, middle, high = reliability(answers, num_bins=10)
    assert (low.low, low.high, low.count, low.accuracy) == (0.5, 0.6, 1, 0)
    assert (middle.count, middle.confidence, middle.accuracy) == (1, pytest.approx(0.8), 1)  # (0.7, 0.8]
    assert (high.count, high.confidence, high.accuracy) == (2, pytest.approx(0.835), 0.5)
    assert mean_gap([low, middle, high]) == pytest.approx((0.55 + 0.2 + 2 * 0.335) / 4)
    assert brier(answers) == pytest.approx(2 * (0.2**2 + 0.19**2 + 0.86**2 + 0.55**2) / 4)


def test_certainty_lies_in_the_last_bin_and_scores_may_be_far_below_zero(make):
    answers = make(
        ("", "a"), ("", "a"), choices=[["a", "b"]] * 2, scores=[[-1.0, -9000.0], [-5000.0, -5003.0]]
    )
    assert probabilities(answers[0]) == [1.0, 0.0]
    (last,) = reliability(answers)
    assert (last.high, last.count, last.accuracy) == (1.0, 2, 1)


def test_choices_may_differ_from_row_to_row(make):
    answers = make(
        ("", "a"), ("", "z"), choices=[["a", "b"], ["x", "y", "z"]], scores=[[0.0, 0.0], [0.0] * 3]
    )
    assert brier(answers) == pytest.approx((0.5 + (4 / 9 + 2 / 9)) / 2)


def test_a_truth_that_is_no_choice_is_refused(make):
    (answer,) = make(("a", "c"), choices=[["a", "b"]], scores=[[-1.0, -2.0]])
    with pytest.raises(ValueError, match=r"test.jsonl:1 \(id 'q0'\): its truth 'c' is none of its choices"):
        reliability([answer])

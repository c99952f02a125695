"""The pictures show what they are given, whatever the labels are."""

import warnings

import pytest
from matplotlib import rcParams
from PIL import Image

from mmpeft.metrics.calibration import Bin
from mmpeft.reporting.figures import draw_confusion, draw_reliability

BLUE, VERMILION = (0, 103, 165), (194, 74, 0)


@pytest.fixture
def drawn(tmp_path):
    """Draws with one of the two functions; returns the picture. Warnings are errors."""

    def run(draw, *parts) -> Image.Image:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            draw(tmp_path / "figure.png", *parts)
        return Image.open(tmp_path / "figure.png").convert("RGB")

    return run


def count(image, color) -> int:
    return sum(number for number, found in image.getcolors(1 << 24) if found == color)


def matrix_of(number, predicted):
    return [[3 if column == predicted(row) else 0 for column in range(number + 1)] for row in range(number)]


@pytest.mark.parametrize("number", [2, 13, 40])
def test_right_is_blue_and_wrong_is_vermilion(drawn, number):
    labels = [f"label {n}" for n in range(number)]
    right = drawn(draw_confusion, labels, matrix_of(number, lambda row: row), "Right")
    wrong = drawn(draw_confusion, labels, matrix_of(number, lambda row: (row + 1) % number))
    assert count(right, BLUE) > 500 * number
    assert count(wrong, VERMILION) > 500 * number
    assert not count(right, VERMILION)
    assert not count(wrong, BLUE)


def test_the_column_of_other_answers_is_drawn_if_there_are_any(drawn):
    labels = [f"label {n}" for n in range(13)]
    other = drawn(draw_confusion, labels, matrix_of(13, lambda row: 13))
    assert count(other, VERMILION) > 5000
    assert other.width > drawn(draw_confusion, labels, matrix_of(13, lambda row: row)).width


def test_any_label_can_be_drawn(drawn):
    hostile = ["$x_{$ \\frac", "什么 🙂", "\x00\n", "", "W" * 300]
    image = drawn(draw_confusion, hostile, matrix_of(5, lambda row: row), "$t_{ " * 50)
    assert image.width < 1200
    assert count(image, BLUE) > 2500


@pytest.mark.parametrize("number", [0, 41])
def test_too_many_labels_are_refused(tmp_path, number):
    with pytest.raises(ValueError, match=f"found {number} labels"):
        draw_confusion(tmp_path / "a.png", ["a"] * number, [[0] * (number + 1)] * number)


def test_bars_are_as_high_as_the_accuracy(drawn):
    halves = [Bin(0.4, 0.5, 10, 0.45, 0.5), Bin(0.5, 0.6, 10, 0.55, 1.0)]
    half, whole = (count(drawn(draw_reliability, [part]), BLUE) for part in halves)
    assert half == pytest.approx(whole / 2, rel=0.1)
    both = drawn(draw_reliability, halves, "Both")
    assert count(both, BLUE) == pytest.approx(half + whole, rel=0.02)


def test_settings_do_not_leak(drawn):
    before = dict(rcParams)
    drawn(draw_confusion, ["a", "b"], [[1, 2, 0], [0, 1, 0]])
    drawn(draw_reliability, [Bin(0.9, 1.0, 2, 0.95, 1.0)])
    assert dict(rcParams) == before

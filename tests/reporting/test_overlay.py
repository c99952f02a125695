"""Overlays: colours in proportion to the values, nothing where there are none."""

import numpy as np
from PIL import Image

from mmpeft.reporting.overlay import PALE, lay_over

GREY = Image.new("RGB", (8, 4), (100, 100, 100))


def lay(*values):
    """Pixels (values, 3) of a row of them."""
    return np.asarray(lay_over(GREY, np.array([values], float)), int)[0]


def test_both_signs_have_a_colour_each_in_proportion_to_the_strongest():
    strongest, half, none, against = lay(2, 1, 0, -2)
    assert strongest[0] > strongest[2]
    assert against[2] > against[0]
    assert none.tolist() == [100, 100, 100]
    np.testing.assert_allclose(half - 100, (strongest - 100) / 2, atol=1)
    assert lay(4, -2)[1].tolist() != against.tolist(), "half as strong as the other"


def test_values_of_one_sign_go_from_the_lowest_to_the_highest():
    lowest, middle, highest = lay(5, 6, 7)
    assert lowest.tolist() == [100, 100, 100]
    np.testing.assert_allclose(middle - 100, (highest - 100) / 2, atol=1)
    assert lay(5, 5).tolist() == [[100, 100, 100]] * 2


def test_several_pictures_have_the_span_of_all():
    def along(span):
        return np.asarray(lay_over(GREY, np.array([[1.0, 0.5]]), span), int)[0] - 100

    alone, with_stronger, beside_one_against = along(None), along((0.0, 2.0)), along((-2.0, 1.0))
    assert alone[1].tolist() == [0, 0, 0]
    np.testing.assert_allclose(with_stronger[0], alone[0] / 2, atol=1)
    np.testing.assert_allclose(beside_one_against, with_stronger, atol=1)


def test_what_has_no_value_is_pale():
    assert lay(np.nan, 1, 0)[0].tolist() == [round(100 + PALE * 155)] * 3
    assert lay(np.nan, np.nan).min() > 200


def test_the_picture_takes_the_heat_maps_size():
    assert lay_over(GREY, np.zeros((10, 20))).size == (20, 10)

"""The map is drawn from two layers to eighty, of any model's names, and of a finetune that diverged."""

import math
import warnings

import pytest
from matplotlib import rcParams
from PIL import Image

from mmpeft.reporting.canvas import SHADES, WIDTH
from mmpeft.reporting.heat_map import _labels, draw_changes

LINEARS = [f"self_attn.{kind}_proj" for kind in "qkvo"] + [
    f"mlp.{kind}_proj" for kind in ("gate", "up", "down")
]
RED = (194, 74, 0)
"""Of the frame around the largest and of the crosses."""


@pytest.fixture
def draw(tmp_path):
    """Draws changes and returns the picture. Warnings are errors."""

    def run(changes, title="a finetune") -> Image.Image:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            draw_changes(tmp_path / "changes.png", changes, title)
        return Image.open(tmp_path / "changes.png").convert("RGB")

    return run


def color(share: float) -> tuple[int, ...]:
    """What a cell of this share of the largest change looks like."""
    return tuple(map(int, SHADES(share, bytes=True)[:3]))


def area(image: Image.Image, wanted: tuple[int, ...]) -> int:
    """How many pixels have a color."""
    return sum(count for count, found in image.getcolors(1 << 24) if found == wanted)


def changes_of(layers: int, names=LINEARS) -> dict[str, float]:
    return {f"model.layers.{n}.{name}": (n + 1) / (100 * layers) for n in range(layers) for name in names}


@pytest.mark.parametrize("layers", [1, 2, 30, 80])
@pytest.mark.parametrize("names", [LINEARS[:1], LINEARS], ids=["one kind", "all"])
def test_every_size_has_cells_that_can_be_seen(draw, layers, names):
    image = draw(changes_of(layers, names))
    assert image.width <= WIDTH
    smallest, largest = (area(image, color(share)) for share in (1 / layers, 1.0))
    assert min(smallest, largest) > 300 * len(names), "at least 300 pixels for each cell of a layer"


def test_colors_follow_the_values(draw):
    one, two, four = (f"layers.{n}.q" for n in range(3))
    image = draw({one: 0.01, two: 0.02, four: 0.04})
    for share in (0.25, 0.5, 1.0):
        assert area(image, color(share)) > 2000
    lightness = [sum(color(share)) for share in (0, 0.25, 0.5, 1.0)]
    assert lightness == sorted(lightness, reverse=True)


def test_a_linear_that_was_not_adapted_is_empty(draw):
    whole = draw(changes_of(4, LINEARS[:2]))
    part = changes_of(4, LINEARS[:2])
    del part[f"model.layers.1.{LINEARS[0]}"]
    assert area(draw(part), (255, 255, 255)) > area(whole, (255, 255, 255)) + 2000
    assert area(draw(part), color(0.5)) < area(whole, color(0.5)) - 2000


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_diverged_finetune_has_crosses(draw, value):
    changes = changes_of(4)
    framed = area(draw(changes), RED)
    assert framed > 100
    assert area(draw(changes | {"model.layers.0.self_attn.q_proj": value}), RED) > framed + 20
    assert area(draw(dict.fromkeys(changes, value)), RED) > 20 * len(changes)


def test_nothing_moved(draw):
    assert area(draw(dict.fromkeys(changes_of(2), 0.0)), color(0)) > 10_000


def test_linears_outside_of_the_layers_have_their_own_column(draw):
    inside = changes_of(2, LINEARS[:1])
    image = draw(inside | {"model.decoder.project_in": 0.02})
    assert area(image, color(0.5)) > 2000
    assert area(image, color(1.0)) > 2000


def test_kinds_are_called_by_what_tells_them_apart():
    assert _labels(["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]) == [
        *("c_attn", "attn.c_proj", "c_fc", "mlp.c_proj")
    ]
    assert _labels(["x.mlp.proj", "mlp.proj", "proj"]) == ["x.mlp.proj", "mlp.proj", "proj"]


def test_a_name_is_no_formula_and_no_style_leaks(draw):
    before = dict(rcParams)
    draw({"layers.0.q_$x_{$": 0.1}, title="$x_{$ \\frac <i>")
    assert dict(rcParams) == before


def test_nothing_to_draw_is_said(draw):
    with pytest.raises(ValueError, match="changes no weights, so there is no map"):
        draw({})

"""A heat map of how far a finetune moved the weights: decoder layers from left to right, linears downwards."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from mmpeft.errors import RefusedError
from mmpeft.reporting.canvas import (
    GREY,
    INK,
    MARGIN,
    SHADES,
    WIDTH,
    WRONG,
    new_sheet,
    separate_cells,
    write_cell,
)

TOP, BOTTOM, BAR, CHARACTER = 132, 76, 190, 12
"""Pixels: above and below the cells, for the bar beside them, and of one letter of a label."""
CELL_WIDTH, CELL_HEIGHT, WRITTEN = 96, 52, 36
"""Pixels: the largest cell, and the width from which its number is written into it."""
NARROWEST = 1000
"""Pixels, so that title and largest value have room."""
LAYER = re.compile(r"(?:^|\.)(\d+)\.(.+)")
"""The number of the decoder layer, the first in a path, and the linear's place in the layer."""


def draw_changes(path: str | Path, changes: Mapping[str, float], title: str) -> None:
    """Draws the relative changes of a finetune's weights into a PNG of at most the report's width.

    A linear that was not adapted is an empty cell; one whose change is NaN or infinite has a cross. Linears outside
    of the decoder layers stand in a column of their own.

    Args:
        changes: path of a linear, such as "model.layers.3.self_attn.q_proj" -> ``|change| / |weight|``.
        title: what was finetuned.

    Raises:
        RefusedError: there is no change to draw.
    """
    if not changes:
        raise RefusedError(
            "no linear's change was given: the finetune changes no weights, so there is no map"
        )
    grid, columns, kinds, places = _matrix(changes)
    finite = {name: value for name, value in changes.items() if math.isfinite(value)}
    largest = max(finite, key=finite.__getitem__, default=None)
    most = 100 * finite[largest] if largest else 0.0
    labels = _labels(kinds)
    left = MARGIN + CHARACTER * max(map(len, labels)) + 12
    cell = min(CELL_WIDTH, (WIDTH - left - BAR) / len(columns))
    width, height = cell * len(columns), CELL_HEIGHT * len(labels)
    with new_sheet(max(NARROWEST, left + width + BAR), TOP + height + BOTTOM) as sheet:
        axes, bar = sheet.axes(left, TOP, width, height), sheet.axes(left + width + 28, TOP, 24, height)
        image = axes.imshow(
            grid, aspect="auto", cmap=SHADES, vmin=0, vmax=most or 1.0, interpolation="nearest"
        )
        separate_cells(axes, len(columns), len(kinds), "white", 0.6)
        _name_cells(axes, columns, labels)
        for name, place in places.items():
            if name not in finite:
                axes.text(*place, "×", color=WRONG, ha="center", va="center", size=9, weight="bold")
            elif cell >= WRITTEN:
                value = 100 * finite[name]
                write_cell(axes, *place, f"{value:.2g}", 6.5, dark=value > 0.4 * most)
        if largest:
            column, row = places[largest]
            frame = {"fill": False, "edgecolor": WRONG, "linewidth": 1.6, "zorder": 3}
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, **frame))
        sheet.write(MARGIN, 52, title, 12, weight="bold")
        sheet.write(MARGIN, 92, _summary(finite, largest, len(changes)), 8.5, GREY)
        shares = sheet.figure.colorbar(image, cax=bar, format=lambda value, _: f"{value:g} %")
        shares.outline.set_visible(False)
        bar.tick_params(length=0, labelsize=8, labelcolor=GREY)
        sheet.save(path)


def _matrix(
    changes: Mapping[str, float],
) -> tuple[list[list[float]], list[int | None], list[str], dict[str, tuple[int, int]]]:
    """Changes in percent, by kind and layer.

    Returns:
        The values (kinds, columns), NaN where there is none; the layer of every column, None for what is outside of
        the layers; the kinds; and the (column, row) of every linear.
    """
    cells = {name: _cell(name) for name in changes}
    layers = [layer for layer, _ in cells.values() if layer is not None]
    columns: list[int | None] = list(range(max(layers, default=-1) + 1))
    if len(layers) < len(cells):
        columns.append(None)
    kinds = list(dict.fromkeys(kind for _, kind in cells.values()))
    grid = [[math.nan] * len(columns) for _ in kinds]
    places = {name: (columns.index(layer), kinds.index(kind)) for name, (layer, kind) in cells.items()}
    for name, (column, row) in places.items():
        grid[row][column] = 100 * changes[name]
    return grid, columns, kinds, places


def _cell(path: str) -> tuple[int | None, str]:
    """(layer, kind) of a linear; no layer where its path has no number."""
    match = LAYER.search(path)
    return (int(match[1]), match[2]) if match else (None, path)


def _labels(kinds: Sequence[str]) -> list[str]:
    """Every kind by as few of its last names as tell it from the others: GPT-2 has attn.c_proj and mlp.c_proj."""

    def short(kind: str) -> str:
        names = kind.split(".")
        ends = (".".join(names[start:]) for start in range(len(names) - 1, -1, -1))
        alone = (end for end in ends if sum(f".{other}".endswith(f".{end}") for other in kinds) == 1)
        return next(alone, kind)

    return [short(kind) for kind in kinds]


def _name_cells(axes: Axes, columns: Sequence[int | None], labels: Sequence[str]) -> None:
    """Writes kinds and layers beside the cells, so many layers that their numbers have room."""
    every = next(step for step in (1, 2, 5, 10, 20, 50, 100) if len(columns) <= 40 * step)
    shown = [n for n, layer in enumerate(columns) if layer is None or layer % every == 0]
    axes.set_xticks(shown, ["other" if columns[n] is None else str(columns[n]) for n in shown])
    axes.set_xlabel("layer")
    axes.set_yticks(range(len(labels)), labels, color=INK)


def _summary(finite: Mapping[str, float], largest: str | None, count: int) -> str:
    lost = f"; {count - len(finite)} of {count} not finite (×)" if len(finite) < count else ""
    found = f"largest {100 * finite[largest]:.3g} % at {largest}" if largest else "nothing finite"
    return f"change of each weight by its own norm: {found}{lost}"

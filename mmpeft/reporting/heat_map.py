"""A map of how far a finetune moved the weights: decoder layers from left to right, kinds of linears downwards."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle

from mmpeft.errors import RefusedError
from mmpeft.reporting.report import BLUE, DPI, GREY, INK, MARGIN, WIDTH, WRONG

COLORS = LinearSegmentedColormap.from_list("change", ["#d3e3ee", BLUE, "#04263d"])
"""Lightness alone tells the value, so it survives grey print."""
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
    finite = {name: value for name, value in changes.items() if math.isfinite(value)}
    with rc_context({"text.parse_math": False}):
        figure, axes, bar, cell = _sheet(len(columns), _labels(kinds))
        largest = max(finite, key=finite.__getitem__, default=None)
        most = 100 * finite[largest] if largest else 0.0
        image = _fill(axes, grid, most or 1.0, columns)
        for name in changes.keys() - finite.keys():
            axes.text(*places[name], "×", color=WRONG, ha="center", va="center", size=9, weight="bold")
        if largest:
            column, row = places[largest]
            axes.add_patch(
                Rectangle(
                    (column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=WRONG, linewidth=1.6, zorder=3
                )
            )
        if cell >= WRITTEN:
            _write(axes, grid, most)
        _name(figure, title, _summary(finite, largest, len(changes)))
        figure.colorbar(image, cax=bar, format=lambda value, _: f"{value:g} %").outline.set_visible(False)
        bar.tick_params(length=0, labelsize=8, labelcolor=GREY)
        figure.savefig(path, format="png", dpi=DPI)


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


def _sheet(num_columns: int, labels: Sequence[str]) -> tuple[Figure, Axes, Axes, float]:
    """The empty sheet, its cells and bar, and the width of a cell in pixels."""
    left = MARGIN + CHARACTER * max(map(len, labels)) + 12
    cell = min(CELL_WIDTH, (WIDTH - left - BAR) / num_columns)
    height = CELL_HEIGHT * len(labels)
    size = max(NARROWEST, left + cell * num_columns + BAR), TOP + height + BOTTOM
    figure = Figure((size[0] / DPI, size[1] / DPI), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)

    def place(x: float, width: float) -> Axes:
        return figure.add_axes((x / size[0], BOTTOM / size[1], width / size[0], height / size[1]))

    axes, bar = place(left, cell * num_columns), place(left + cell * num_columns + 28, 24)
    for each in (axes, bar):
        each.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=8, labelcolor=GREY)
    axes.set_yticks(range(len(labels)), labels, color=INK)
    return figure, axes, bar, cell


def _fill(
    axes: Axes, grid: Sequence[Sequence[float]], most: float, columns: Sequence[int | None]
) -> AxesImage:
    image = axes.imshow(grid, aspect="auto", cmap=COLORS, vmin=0, vmax=most, interpolation="nearest")
    every = next(step for step in (1, 2, 5, 10, 20, 50, 100) if len(columns) <= 40 * step)
    shown = [n for n, layer in enumerate(columns) if layer is None or layer % every == 0]
    axes.set_xticks(shown, ["other" if columns[n] is None else str(columns[n]) for n in shown])
    axes.set_xlabel("layer", size=8, color=GREY)
    for edge in range(1, len(columns)):
        axes.axvline(edge - 0.5, color="white", linewidth=0.6)
    for edge in range(1, len(grid)):
        axes.axhline(edge - 0.5, color="white", linewidth=0.6)
    return image


def _write(axes: Axes, grid: Sequence[Sequence[float]], most: float) -> None:
    """Every number into its cell, white on dark."""
    for row, values in enumerate(grid):
        for column, value in enumerate(values):
            if math.isfinite(value):
                dark = value > 0.4 * most
                axes.text(
                    column,
                    row,
                    f"{value:.2g}",
                    ha="center",
                    va="center",
                    size=6.5,
                    color="white" if dark else INK,
                )


def _name(figure: Figure, title: str, summary: str) -> None:
    width, height = (inches * DPI for inches in figure.get_size_inches())
    figure.text(MARGIN / width, 1 - 52 / height, title, size=12, weight="bold", color=INK)
    figure.text(MARGIN / width, 1 - 92 / height, summary, size=8.5, color=GREY)


def _summary(finite: Mapping[str, float], largest: str | None, count: int) -> str:
    lost = f"; {count - len(finite)} of {count} not finite (×)" if len(finite) < count else ""
    found = f"largest {100 * finite[largest]:.3g} % at {largest}" if largest else "nothing finite"
    return f"change of each weight by its own norm: {found}{lost}"

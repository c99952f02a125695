"""Confusion matrix and calibration curve: what was taken for what, and how far confidence can be trusted."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.ticker import MaxNLocator

from mmpeft.errors import RefusedError
from mmpeft.metrics.calibration import Bin, mean_gap
from mmpeft.reporting.canvas import (
    BLUE,
    DPI,
    GREY,
    INK,
    LINE,
    PALE,
    WRONG,
    Sheet,
    new_sheet,
    separate_cells,
    shorten,
    write_cell,
)

MAX_CLASSES, MAX_LABEL, MAX_TITLE = 40, 20, 40
"""Most labels that stay readable, and most characters of one and of the title."""
OTHER = "(other)"
MIN_WIDTH, BIN_PIXELS = 600, 40
"""Pixels: of a sheet, so that a title fits, and of a bin."""


def draw_confusion(
    path: str | Path, labels: Sequence[str], matrix: Sequence[Sequence[int]], title: str = ""
) -> None:
    """Draws a confusion matrix into a PNG: a row is a truth, its cells are coloured by their share of the row.

    Right answers are blue, wrong ones vermilion. The column of answers that are no label is left out if empty.

    Args:
        labels, matrix: what `classification.confusion` returns, (labels) and (labels, labels + 1).

    Raises:
        RefusedError: there are more than 40 labels, which nobody can read, or none.
    """
    if not 1 <= len(labels) <= MAX_CLASSES:
        raise RefusedError(
            f"found {len(labels)} labels to draw; wanted 1 to {MAX_CLASSES}; group or drop some"
        )
    columns = len(labels) + any(row[-1] for row in matrix)
    shown = [shorten(label, MAX_LABEL) for label in labels]
    heads = [*shown, OTHER][:columns]
    cell = 64 if len(labels) <= 12 else 44 if len(labels) <= 24 else 34
    left = 80 + 11 * max(map(len, heads))
    top, width, height = left + 50, columns * cell, len(labels) * cell
    with new_sheet(max(left + width + 40, MIN_WIDTH), top + height + 40) as sheet:
        axes = _axes(sheet, left, top, width, height)
        _fill(axes, [row[:columns] for row in matrix], cell)
        axes.set_xticks(range(columns), heads, rotation=90)
        axes.set_yticks(range(len(labels)), shown)
        axes.xaxis.tick_top()
        axes.xaxis.set_label_position("top")
        axes.set(xlabel="answered", ylabel="truth")
        if columns > len(labels):
            axes.axvline(columns - 1.5, color=GREY, linewidth=1)
        _save(sheet, path, title)


def draw_reliability(path: str | Path, bins: Sequence[Bin], title: str = "") -> None:
    """Draws, into a PNG, how often answers are right by how sure they are, and how many there are.

    Bars on the diagonal are calibrated; below it the answers are surer than they are right.

    Args:
        bins: what `calibration.reliability` returns.
    """
    size = BIN_PIXELS * 15
    with new_sheet(size + 150, size + 320) as sheet:
        above = _axes(sheet, 100, 80, size, size)
        below = _axes(sheet, 100, size + 110, size, 110)
        edges, widths = [part.low for part in bins], [part.high - part.low for part in bins]
        style = {"align": "edge", "edgecolor": "white", "linewidth": 1}
        above.bar(edges, [part.accuracy for part in bins], widths, color=BLUE, **style)
        above.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
        sure = [part.confidence for part in bins]
        above.plot(sure, [part.accuracy for part in bins], "o", color=WRONG, markersize=5, clip_on=False)
        above.set(xlim=(0, 1), ylim=(0, 1), ylabel="right")
        above.text(
            0.03, 0.93, f"calibration error {mean_gap(bins):.3f}", fontsize=9, weight="bold", color=INK
        )
        below.bar(edges, [part.count for part in bins], widths, color=GREY, **style)
        below.set(xlim=(0, 1), xlabel="confidence", ylabel="answers")
        below.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        above.set_xticklabels([])
        _save(sheet, path, title)


def _fill(axes: Axes, counts: Sequence[Sequence[int]], cell: int) -> None:
    """One square per count: white for a share of 0 of its row, the full colour for 1."""
    shares = [[count / max(1, sum(row)) for count in row] for row in counts]
    colours = [
        [_blend(BLUE if x == y else WRONG, share) for x, share in enumerate(row)]
        for y, row in enumerate(shares)
    ]
    axes.imshow(colours)
    for y, row in enumerate(counts):
        for x, count in enumerate(row):
            text = f"{count}" if count < 10_000 else f"{count / 1000:.0f}k"
            size = min(9.0, 0.42 * cell * 72 / DPI, 1.3 * cell * 72 / DPI / max(1, len(text)))
            write_cell(axes, x, y, text if count else "", size, dark=shares[y][x] > 0.5)
    separate_cells(axes, len(counts[0]), len(counts), LINE, 0.5)


def _blend(colour: str, share: float) -> tuple[float, ...]:
    return tuple(1 - share * (1 - part) for part in to_rgb(colour))


def _axes(sheet: Sheet, left: int, top: int, width: int, height: int) -> Axes:
    axes = sheet.axes(left, top, width, height, labels=INK)
    axes.set_facecolor(PALE)
    return axes


def _save(sheet: Sheet, path: str | Path, title: str) -> None:
    if title:
        sheet.write(0.03 * sheet.width, 24, shorten(title, MAX_TITLE), 10, weight="bold", va="top")
    sheet.save(path)

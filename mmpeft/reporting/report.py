"""``report.png``, a run at a glance: training curves, what it took, images with question and answer."""

import csv
import math
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, cycle
from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator
from PIL import Image

from mmpeft.data.images import load_image
from mmpeft.metrics.registry import exact_match
from mmpeft.reporting.canvas import (
    BLUE,
    GREY,
    INK,
    LINE,
    MARGIN,
    PALE,
    PALETTE,
    RIGHT,
    WIDTH,
    WRONG,
    Sheet,
    new_sheet,
)

TALLEST, GAP = 4000, 28
"""Pixels. The page is cut to what was drawn."""
PANEL_HEIGHT, FACTS_WIDTH, FACTS_NAME, MAX_EXAMPLES = 216, 520, 156, 12
Curve = list[tuple[float, float]]
"""(step, value) in the order of the steps."""


@dataclass
class ShownExample:
    """One question as it was answered."""

    image: str | Image.Image | None
    """The image or its path; None for a question about text alone."""
    question: str
    truth: str | None
    """None where nobody knows: the answer is shown without a verdict."""
    answer: str
    whole: bool = True
    """Whether this image and question are all that was read."""

    @property
    def right(self) -> bool | None:
        """Whether the answer is exactly the truth; None without a truth."""
        return None if self.truth is None else exact_match(self.answer, self.truth)


def draw_report(
    path: str | Path,
    curves: str | Path | None,
    examples: Sequence[ShownExample],
    title: str,
    facts: Mapping[str, str],
) -> None:
    """Draws a run into a PNG, 1600 pixels wide and as tall as its content needs (about 1000).

    Args:
        curves: the ``metrics.csv`` of Lightning's CSVLogger.
        examples: the first 12 are drawn.
        facts: what the run is measured by and what it took, in the order to be read.

    Raises:
        ImageError: an example's image cannot be read.
    """
    with new_sheet(WIDTH, TALLEST) as page:
        y = page.text(MARGIN, 26, title, WIDTH - 2 * MARGIN, size=17, weight="bold") + 14
        y = _draw_summary(page, y, read_curves(curves) if curves else {}, facts)
        page.save(path, _draw_examples(page, y, examples[:MAX_EXAMPLES]) + GAP)


def read_curves(path: str | Path) -> dict[str, Curve]:
    """The columns of a ``metrics.csv`` without their empty cells; of a step logged twice the later row.

    What is no number is left out with a warning; nan and inf stay, as a run that diverged must show.
    """
    columns: dict[str, dict[int, float]] = defaultdict(dict)
    bad: list[str] = []
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        rows = csv.DictReader(file, restkey="beyond the header")
        for number, row in enumerate(rows):
            for name in [name for name, cell in row.items() if cell and name != "step"]:
                try:
                    columns[name][int(float(row.get("step") or number))] = float(row[name])
                except (ValueError, TypeError, OverflowError):
                    bad.append(f"line {rows.line_num}, step {row.get('step')!r}, {name} {row[name]!r}")
    if bad:
        warnings.warn(f"{path}: {len(bad)} bad cells are not drawn: {'; '.join(bad[:3])}", stacklevel=2)
    return {name: sorted(values.items()) for name, values in columns.items() if values}


def _draw_summary(page: Sheet, y: float, curves: Mapping[str, Curve], facts: Mapping[str, str]) -> float:
    """Panels on the left, facts on the right; either alone takes the whole width."""
    train, val, match = (curves.get(name, []) for name in ("train_loss", "val_loss", "val_exact_match"))
    losses, matches = (_by_finetune(curves, name) for name in ("train_loss", "val_exact_match"))
    panels = {
        "Loss by step": (_draw_losses, [losses]) if losses else (_draw_loss, [train, val]),
        "Exact match by step": (_draw_matches, [matches]) if matches else (_draw_match, [match]),
    }
    panels = {title: panel for title, panel in panels.items() if any(panel[1])}
    drawn_curves = [train, val, match, *losses.values(), *matches.values()]
    left, bottoms, last = MARGIN, [y], max([1, *(curve[-1][0] for curve in drawn_curves if curve)])
    for title, (draw, drawn) in panels.items():
        width = (WIDTH - 2 * MARGIN - (FACTS_WIDTH if facts else 0)) // len(panels)
        page.text(left, y, title, width, size=10, weight="bold")
        axes = page.axes(left + 52, y + 50, width - 52 - 2 * GAP, PANEL_HEIGHT)
        axes.grid(axis="y", color=LINE, linewidth=0.7)
        axes.tick_params(which="both", pad=6)
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))  # a step has no half
        axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
        draw(axes, *drawn)
        axes.set_xlim(0, 1.02 * last)
        left, bottoms = left + width, [y + PANEL_HEIGHT + 96]
    columns = 1 if panels else 3
    width = (WIDTH - MARGIN - left - (columns - 1) * GAP) // columns
    tops = [y] * columns
    for number, (name, value) in enumerate(facts.items()):
        x, top = left + number % columns * (width + GAP), tops[number % columns]
        page.box(x, top, width, 1, LINE)
        named = page.text(x, top + 8, name, FACTS_NAME - 8, lines=2, color=GREY)
        end = page.text(x + FACTS_NAME, top + 8, str(value), width - FACTS_NAME, lines=3, weight="bold")
        tops[number % columns] = max(named, end) + 8
    return max(bottoms + [top + GAP for top in tops if facts])


def _by_finetune(curves: Mapping[str, Curve], name: str) -> dict[str, Curve]:
    """Finetune -> its curve, where several trained together: their columns are called ``name/finetune``."""
    own = {
        column.partition("/")[2]: curve for column, curve in curves.items() if column.startswith(f"{name}/")
    }
    return {finetune: [p for p in curve if math.isfinite(p[1])] for finetune, curve in own.items()}


def _draw_losses(axes: Axes, losses: Mapping[str, Curve]) -> None:
    """The smoothed training loss of every finetune."""
    for color, (name, curve) in zip(cycle(PALETTE), losses.items(), strict=False):
        if curve:
            axes.plot(*zip(*_smooth(curve), strict=True), color=color, linewidth=1.6, label=name)
    _legend(axes, "upper right")


def _draw_matches(axes: Axes, matches: Mapping[str, Curve]) -> None:
    """The share of exactly right answers of every finetune, with the last one in the legend."""
    for color, (name, curve) in zip(cycle(PALETTE), matches.items(), strict=False):
        if curve:
            label = f"{name} {curve[-1][1]:.3f}"
            axes.plot(
                *zip(*curve, strict=True), color=color, marker="o", markersize=4, linewidth=1.6, label=label
            )
    axes.set_ylim(0, 1)
    _legend(axes, "lower right")


def _legend(axes: Axes, place: Literal["upper right", "lower right"]) -> None:
    axes.legend(frameon=False, fontsize=8, labelcolor=GREY, loc=place, borderpad=0, handlelength=1.4)


def _draw_loss(axes: Axes, train: Curve, val: Curve) -> None:
    """Training thin and smoothed, validation with markers; logarithmic where values span more than 20x."""
    logged = len(train) + len(val)
    train, val = ([point for point in curve if math.isfinite(point[1])] for curve in (train, val))
    if train:
        axes.plot(*zip(*train, strict=True), color=BLUE, alpha=0.25, linewidth=0.8)
        axes.plot(*zip(*_smooth(train), strict=True), color=BLUE, linewidth=1.8, label="train")
    if val:
        (line,) = axes.plot(*zip(*val, strict=True), color=WRONG, linewidth=1.2, label="validation")
        line.set(marker="o", markersize=4)
    if lost := logged - len(train) - len(val):
        axes.plot([], [], " ", label=f"{lost} not finite")
    values = [value for _, value in train + val] or [1]
    if 0 < min(values) < max(values) / 20:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(values) < 500 * min(values) else (1,)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.minorticks_off()
    _legend(axes, "upper right")


def _draw_match(axes: Axes, curve: Curve) -> None:
    """The share of exactly right answers, with the last one written out."""
    steps, shares = zip(*curve, strict=True)
    axes.plot(steps, shares, color=RIGHT, marker="o", markersize=4, linewidth=1.8, clip_on=False)
    axes.fill_between(steps, shares, color=RIGHT, alpha=0.08, linewidth=0)
    axes.set_ylim(0, 1)
    label = axes.annotate(
        f"{shares[-1]:.3f}", curve[-1], (0, -16 if shares[-1] > 0.8 else 8), textcoords="offset points"
    )
    label.set(ha="right", size=10, weight="bold", color=RIGHT)


def _smooth(curve: Curve) -> Curve:
    """Around each point the mean over a twentieth of the curve."""
    reach, sums = len(curve) // 40, [0.0, *accumulate(value for _, value in curve)]
    spans = [(max(0, i - reach), min(len(curve), i + reach + 1)) for i in range(len(curve))]
    return [(x, (sums[b] - sums[a]) / (b - a)) for (x, _), (a, b) in zip(curve, spans, strict=True)]


def _draw_examples(page: Sheet, y: float, examples: Sequence[ShownExample]) -> float:
    """A grid of one row, or two from seven examples on."""
    verdicts = [example.right for example in examples if example.right is not None]
    heading = f"Examples: {sum(verdicts)} of {len(verdicts)} right" if verdicts else "Examples"
    y = page.text(MARGIN, y, heading if examples else "", WIDTH, size=10, weight="bold") + 12
    columns = max(4, len(examples) if len(examples) <= 6 else -(-len(examples) // 2))
    width = (WIDTH - 2 * MARGIN - (columns - 1) * GAP) // columns
    for start in range(0, len(examples), columns):
        top, row = y + (GAP if start else 0), enumerate(examples[start : start + columns])
        y = max(_draw_example(page, MARGIN + n * (width + GAP), top, width, e) for n, e in row)
    return y


def _draw_example(page: Sheet, x: int, y: float, width: int, example: ShownExample) -> float:
    """Image, question, answer and truth under each other. Returns where they end."""
    height, top = round(0.8 * width), round(y)
    color, mark = {True: (RIGHT, "✓ "), False: (WRONG, "✗ "), None: (INK, "")}[example.right]
    y, drawn = top + height + 10, width
    if example.image is None:
        page.box(x, top, width, height, PALE)
        page.text(x + 20, top + 16, example.question, width - 40, lines=(height - 32) // 27)
    else:
        image = _fit(load_image(example.image), width, height)
        page.image(x, top + height, image)
        y, drawn = page.text(x, y, example.question, width, lines=3), image.width
    page.box(x, top + height, drawn, 5, color if mark else LINE)
    answer = mark + (example.answer.strip() or "(empty)")
    y = page.text(x, y, answer, width, lines=2, size=9.5, color=color, weight="bold")
    truth = "" if example.truth is None else f"truth: {example.truth}"
    return page.text(x, y, truth, width, lines=2, size=8, color=GREY)


def _fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """The image as large as fits. Enlarged pixels stay sharp squares: repeated, then averaged to size."""
    scale = min(width / image.width, height / image.height)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    if scale <= 1:
        return image.resize(size, Image.Resampling.LANCZOS)
    times = math.ceil(scale)
    repeated = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    return repeated.resize(size, Image.Resampling.BOX)

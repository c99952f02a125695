"""What `compare_methods` found, as a table and a picture.

A row is what is known of one method: its "method", "title", "learning_rate" and "source", and its figures, or
"error" in their place. What it forgot about images, where that was measured, is in "of_images".
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.ticker import LogLocator, NullFormatter

from mmpeft.reporting.canvas import GREY, INK, LINE, SHADES, WIDTH, WRONG, new_sheet, one_line
from mmpeft.reporting.tables import markdown_table

Row = Mapping[str, Any]
Box = tuple[float, float, float, float]
"""Left, bottom, right, top in pixels."""
HEIGHT, LEFT, TOP = 900, 120, 126
"""Pixels of the picture, and where its axes begin."""
POINT = 18
"""Pixels around a point's middle that no name may cover."""
SIDES = (
    *((side, right, 0) for side, right in (("left", 9), ("right", -9))),
    *(("center", 0, above) for above in (14, -14)),
    *((side, right, above) for above in (11, -11) for side, right in (("left", 7), ("right", -7))),
)
"""Where a name may stand: how it is aligned, and points to the right of and above its own; the best first."""
MAX_REASON = 200
"""Characters of an error in the table."""


def _perplexity(figures: Row) -> str:
    return f"{figures['perplexity_base']:.2f} → {figures['perplexity']:.2f}"


def _same_token(figures: Row) -> str:
    return f"{100 * figures['same_token']:.1f} %"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "accuracy": lambda row: f"{row['accuracy']:.3f}",
    "parameters trained": lambda row: f"{row['trained']:,}",
    "share of the LLM": lambda row: f"{100 * row['share']:.3f} %",
    "files, MB": lambda row: f"{row['files_mb']:.2f}",
    "peak memory, GB": lambda row: f"{row['peak_gb']:.2f}",
    "s per step": lambda row: f"{row['step_seconds']:.2f}",
    "ms per answer added": lambda row: f"{row['answer_ms']:+.1f}",
    "perplexity of other text": _perplexity,
    "same next token": _same_token,
}
"""Heading -> a method's row -> the cell."""
IMAGE_COLUMNS = {"perplexity about other images": _perplexity, "same next token there": _same_token}
"""Heading -> a row's "of_images" -> the cell."""
EMPTY = "–"
LEGEND = """- accuracy: exact match of the written answers
- parameters trained, share, files: the adapter's; a projector that trains beside it is not counted
- peak memory: of the process that trained, resident, not the GPU's
- s per step: median time from step to step by TensorBoard's clock, without validation. Full fine-tuning is kept as a
  change beside the frozen weights, so that it can be served like the others: a second product that an own copy of the
  base would not need
- ms per answer added: the same batch answered by finetune and base in turn in one process (`benchmarks answering`)
- other text: plain text without images, base → finetuned, and how often both find the same next token likeliest"""
IMAGE_LEGEND = """- other images: the same of answers about images (`test.held_images`), which both read through the
  run's projector"""


def make_table(rows: Sequence[Row], command: str, budget: str) -> str:
    """The rows as GitHub's markdown, with the command, the machine and where each learning rate comes from.

    Args:
        rows: of the methods, in the order to be read.
        command: what makes this table.
        budget: what every method was given, in words.
    """
    images = any("of_images" in row for row in rows)
    head = ["method", *COLUMNS, *(IMAGE_COLUMNS if images else ())]
    lines = [[row["title"], *_cells(row)] for row in rows]
    lines = [cells + [EMPTY] * (len(head) - len(cells)) for cells in lines]
    machines = sorted({row["machine"] for row in rows if "error" not in row})
    rates = [f"- {row['title']}: {row['learning_rate']:g}; {row['source']}" for row in rows]
    parts = [
        markdown_table(head, lines, ["---"] + ["---:"] * (len(head) - 1)),
        "; ".join([f"`{command}`", *machines, budget]),
        "\n".join([LEGEND, IMAGE_LEGEND]) if images else LEGEND,
        "Learning rates, all of AdamW:",
        "\n".join(rates),
    ]
    return "\n\n".join(parts) + "\n"


def _cells(row: Row) -> list[str]:
    """As far as there are figures."""
    if "error" in row:
        return [_reason(row)]
    of_images = [show(row["of_images"]) for show in IMAGE_COLUMNS.values()] if "of_images" in row else []
    return [*(show(row) for show in COLUMNS.values()), *of_images]


def _reason(row: Row) -> str:
    """Why a method failed; breaks no table."""
    reason = one_line(row["error"]).replace("|", "\\|")
    return f"failed: {reason if len(reason) <= MAX_REASON else f'{reason[:MAX_REASON]} …'}"


def draw_comparison(path: Path, rows: Sequence[Row]) -> None:
    """Draws accuracy against parameters trained into a PNG of 1600 x 900 pixels.

    The colour is the perplexity of other text, after by before; where that is not finite, the point is vermilion.

    Args:
        rows: at least one; those with "error" are left out.
    """
    shown = [row for row in rows if "error" not in row]
    ratios = [row["perplexity"] / row["perplexity_base"] for row in shown]
    finite = [ratio for ratio in ratios if math.isfinite(ratio)] or [1.0]
    lowest, highest = min(1.0, *finite), max(1.5, *finite)
    with new_sheet(WIDTH, HEIGHT) as sheet:
        axes, bar = sheet.axes(LEFT, TOP, 1232, 666), sheet.axes(1424, TOP, 29, 666)
        across, up = ([row[key] for row in shown] for key in ("trained", "accuracy"))
        style = {"s": 110, "edgecolors": INK, "linewidths": 0.8, "plotnonfinite": True}
        colors = SHADES.with_extremes(bad=WRONG)
        points = axes.scatter(across, up, c=ratios, cmap=colors, norm=LogNorm(lowest, highest), **style)
        axes.set_xscale("log")
        axes.set_axisbelow(True)
        axes.grid(color=LINE, linewidth=0.7)
        axes.margins(0.14, 0.14)
        axes.set(xlabel="parameters trained", ylabel="accuracy on held-out questions")
        axes.xaxis.set_major_formatter(lambda value, _: _short(value))
        axes.xaxis.set_minor_formatter(NullFormatter())
        ticks = LogLocator(subs=(1, 1.2, 1.5, 2, 3, 5) if highest < 20 * lowest else (1,))
        drawn = sheet.figure.colorbar(points, cax=bar, ticks=ticks, format=lambda value, _: f"{value:.3g}×")
        drawn.outline.set_visible(False)
        bar.minorticks_off()
        bar.tick_params(length=0, labelsize=8, labelcolor=GREY)
        bar.set_title("perplexity of\nother text,\nafter / before", size=8, color=GREY, loc="left", pad=10)
        title = "One base, one budget: what each method reaches, trains and forgets"
        sheet.write(LEFT, 63, title, 12, weight="bold")
        sheet.canvas.draw()  # the limits of the axes are known only then
        _name_points(axes, sheet.canvas, [row["title"] for row in shown], list(zip(across, up, strict=True)))
        sheet.save(path)


def _name_points(
    axes: Axes, canvas: FigureCanvasAgg, names: Sequence[str], places: Sequence[tuple[float, float]]
) -> None:
    """Names every point on the side where it covers least of points and earlier names, and stays in the axes."""
    frame = axes.get_window_extent().extents
    middles = [axes.transData.transform(place) for place in places]
    taken: list[Box] = [(x - POINT, y - POINT, x + POINT, y + POINT) for x, y in middles]
    for name, place in zip(names, places, strict=True):
        label = axes.annotate(name, place, (0, 0), textcoords="offset points", va="center", size=9, color=INK)

        def covers(side: tuple[str, float, float], label: Any = label) -> float:
            label.set(ha=side[0])
            label.xyann = side[1:]
            box = label.get_window_extent(canvas.get_renderer()).extents
            outside = _shared(box, box) - _shared(box, frame)
            return outside + sum(_shared(box, other) for other in taken)

        covers(min(SIDES, key=covers))
        taken.append(label.get_window_extent(canvas.get_renderer()).extents)


def _shared(a: Box, b: Box) -> float:
    """Area that two boxes have in common."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _short(number: float) -> str:
    """10 k, 1 M: a large number as people say it."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:g} {letter}"
    return f"{number:g}"

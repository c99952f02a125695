"""The page of an explanation: heat maps over the pictures, the answer's tokens under base and finetune, the layers that
moved."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from PIL import Image

from mmpeft.reporting.canvas import (
    BLUE,
    GREY,
    INK,
    LINE,
    MARGIN,
    WIDTH,
    WRONG,
    Sheet,
    new_sheet,
    one_line,
    shorten,
)

GAP, HEIGHT, PANEL = 36, 460, 380
"""Pixels: between columns, of the largest picture, and of a panel of bars."""
SHOWN, LONGEST = 12, 18
"""Tokens that are drawn, and characters of each."""


@dataclass
class ShownMaps:
    """A picture and what was laid over it."""

    picture: Image.Image
    overlays: list[Image.Image]
    told: list[str]
    """What stands beneath each."""


def draw_explanation(
    path: str | Path,
    title: str,
    question: str,
    shown: Sequence[ShownMaps],
    tokens: Sequence[tuple[str, float, float]],
    layers: Sequence[float],
    finetune: str,
    remarks: Sequence[str] = (),
) -> None:
    """Draws a PNG, 1600 pixels wide and as tall as its content needs.

    Args:
        tokens: (text, probability under the base, under the finetune) of the answer's, of which the first are drawn.
        layers: how far each is from the base's; none leaves the panel out.
        remarks: what is to be said besides.
    """
    tallest = 700 + PANEL + len(shown) * (HEIGHT + 200) + 90 * len(remarks)
    with new_sheet(WIDTH, tallest) as page:
        y = page.text(MARGIN, 26, title, WIDTH - 2 * MARGIN, lines=2, size=17, weight="bold")
        y = page.text(MARGIN, y, question, WIDTH - 2 * MARGIN, lines=2, size=11, color=GREY) + 24
        for maps in shown:
            y = _draw_maps(page, y, maps) + 28
        for remark in remarks:
            y = page.text(MARGIN, y, remark, WIDTH - 2 * MARGIN, lines=3, color=GREY) + 8
        page.save(path, _draw_panels(page, y + 12, tokens, layers, finetune))


def _draw_maps(page: Sheet, y: float, maps: ShownMaps) -> float:
    """The picture, then each of its overlays. Returns where they end."""
    columns = [(maps.picture, "the image"), *zip(maps.overlays, maps.told, strict=True)]
    width = (WIDTH - 2 * MARGIN - (len(columns) - 1) * GAP) // max(3, len(columns))
    scale = min(width / maps.picture.width, HEIGHT / maps.picture.height)
    size = max(1, round(maps.picture.width * scale)), max(1, round(maps.picture.height * scale))
    bottom, ends = round(y) + size[1], [y]
    for number, (image, told) in enumerate(columns):
        x = MARGIN + number * (width + GAP)
        page.image(x, bottom, image.convert("RGB").resize(size, Image.Resampling.LANCZOS))
        ends.append(page.text(x, bottom + 10, told, width, lines=5, size=8, color=GREY))
    return max(ends)


def _draw_panels(
    page: Sheet, y: float, tokens: Sequence[tuple[str, float, float]], layers: Sequence[float], finetune: str
) -> float:
    """Tokens on the left, layers on the right. Returns where they end."""
    width = (WIDTH - 2 * MARGIN - 2 * GAP) / 2
    height = min(PANEL, 98 + 52 * min(len(tokens), SHOWN))
    more = f", the first {SHOWN} of {len(tokens)} tokens" if len(tokens) > SHOWN else ""
    page.text(MARGIN, y, f"Probability of the answer's tokens{more}", width, size=10, weight="bold")
    label = 12 * max(len(_label(text)) for text, *_ in tokens[:SHOWN]) + 20
    axes = page.axes(MARGIN + label, y + 80, width - label - 60, height - 88)
    _draw_tokens(axes, tokens[:SHOWN], finetune)
    if layers:
        left = MARGIN + width + 2 * GAP
        page.text(left, y, "How far each layer is from the base's", width, size=10, weight="bold")
        _draw_layers(page.axes(left + 60, y + 80, width - 60, PANEL - 88), layers)
        height = PANEL
    return y + height + 72


def _draw_tokens(axes: Axes, tokens: Sequence[tuple[str, float, float]], finetune: str) -> None:
    """Two bars for each, the first on top."""
    for offset, name, color, own in (
        (-0.19, "base", GREY, [base for _, base, _ in tokens]),
        (0.19, finetune, BLUE, [own for _, _, own in tokens]),
    ):
        places = [number + offset for number in range(len(tokens))]
        axes.barh(places, own, height=0.34, color=color, label=shorten(name, 24))
        for place, value in zip(places, own, strict=True):
            axes.text(value + 0.01, place, f"{value:.3f}", size=7.5, color=GREY, va="center_baseline")
    axes.set_yticks(range(len(tokens)), [_label(text) for text, *_ in tokens], color=INK)
    axes.set_ylim(len(tokens) - 0.5, -0.5)
    axes.set_xlim(0, 1.08)
    axes.set_xticks([0, 0.5, 1])
    axes.legend(frameon=False, fontsize=8, labelcolor=GREY, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)


def _label(text: str) -> str:
    return shorten(text, LONGEST) if one_line(text) else repr(text)


def _draw_layers(axes: Axes, layers: Sequence[float]) -> None:
    axes.bar(
        range(len(layers)), layers, width=0.8, color=[WRONG if own == max(layers) else BLUE for own in layers]
    )
    axes.grid(axis="y", color=LINE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    axes.set_xlabel("layer")
    axes.set_ylabel("|difference| / |base|")

"""Drawing with matplotlib: palette, fonts, a sheet to draw on in pixels from its top left, cells of a heat map."""

import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, fontManager
from matplotlib.patches import Rectangle
from PIL import Image

DPI, WIDTH, MARGIN = 160, 1600, 56
"""Pixels per inch, and pixels: of the widest sheet and of its rim."""
INK, GREY, LINE, PALE = "#1b1f24", "#6b7280", "#dfe2e6", "#f4f5f7"
BLUE, RIGHT, WRONG = "#0067a5", "#00795a", "#c24a00"
"""Colour-blind safe: Okabe and Ito's blue, green and vermilion, darkened to be read on white."""
PALETTE = (BLUE, WRONG, RIGHT, "#a3467f", "#8a6d00", "#3b8fc4", "#4d4d4d", "#e08a00")
"""Of several finetunes, in order; the same source."""
SHADES = LinearSegmentedColormap.from_list("shades", ["#d3e3ee", BLUE, "#04263d"])
"""Of a heat map's values. Lightness alone tells the value, so it survives grey print."""
FONTS = ("DejaVu Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "Hiragino Sans", "Microsoft YaHei")
"""The first comes with matplotlib; the others, where installed, draw what it lacks."""


class Sheet:
    """A white sheet of so many pixels; every place is told in pixels from its top left."""

    def __init__(self, width: float, height: float):
        self.width, self.height = width, height
        self.figure = Figure((width / DPI, height / DPI), dpi=DPI, facecolor="white")
        self.canvas = FigureCanvasAgg(self.figure)

    def axes(self, x: float, y: float, width: float, height: float, labels: str = GREY) -> Axes:
        """Axes without frame and tick marks; `labels` is the color of the numbers."""
        axes = self.figure.add_axes(
            (x / self.width, 1 - (y + height) / self.height, width / self.width, height / self.height)
        )
        axes.spines[:].set_visible(False)
        axes.tick_params(which="both", length=0, labelsize=8, labelcolor=labels)
        for axis in (axes.xaxis, axes.yaxis):
            axis.label.set(color=GREY, size=8)
        return axes

    def box(self, x: float, y: float, width: float, height: float, color: str) -> None:
        corner = x / self.width, 1 - (y + height) / self.height
        size = width / self.width, height / self.height
        self.figure.add_artist(Rectangle(corner, *size, color=color, linewidth=0))

    def image(self, x: float, bottom: float, image: Image.Image) -> None:
        """An image pixel for pixel."""
        self.figure.figimage(image, x, self.height - bottom, origin="upper")  # pyright: ignore[reportArgumentType]

    def write(
        self,
        x: float,
        y: float,
        text: str,
        size: float,
        color: str = INK,
        weight: str = "normal",
        va: str = "baseline",
    ) -> None:
        """One line of text as it is."""
        place = x / self.width, 1 - y / self.height
        self.figure.text(*place, text, size=size, color=color, weight=weight, va=va)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        width: float,
        lines: int = 1,
        size: float = 8.5,
        color: str = INK,
        weight: str = "normal",
    ) -> float:
        """Text wrapped to a width in pixels and a number of lines. Returns where it ends."""
        em, font = size * DPI / 72, FontProperties(size=size, weight=weight)
        for line in self._wrap(text, font, width, lines, start=int(4 * width / em)):
            y += 1.4 * em
            self.write(x, y - 0.4 * em, line, size, color, weight)
        return y

    def _wrap(self, text: str, font: FontProperties, width: float, lines: int, start: int) -> list[str]:
        """The longest lines that fit, measured in the font; an ellipsis stands for what does not."""
        measure = self.canvas.get_renderer().get_text_width_height_descent
        for characters in range(start, 1, -1):
            wrapped = textwrap.wrap(one_line(text[:1000]), characters, max_lines=lines, placeholder=" …")
            if all(measure(line, font, False)[0] <= width for line in wrapped):
                return wrapped
        return ["…"]

    def save(self, path: str | Path, height: float | None = None) -> None:
        """Writes the PNG, cut to a height in pixels."""
        self.canvas.draw()
        image = Image.frombytes("RGBA", self.canvas.get_width_height(), bytes(self.canvas.buffer_rgba()))
        bottom = image.height if height is None else min(image.height, round(height))
        image.crop((0, 0, image.width, bottom)).convert("RGB").save(path, "PNG", optimize=True)


@contextmanager
def new_sheet(width: float, height: float) -> Iterator[Sheet]:
    """A sheet with our fonts, on which "$" is no formula; the caller's matplotlib settings stay as they are."""
    installed = set(fontManager.get_font_names())
    fonts = [font for font in FONTS if font in installed]
    with rc_context({"font.family": fonts, "text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        yield Sheet(width, height)


def separate_cells(axes: Axes, num_columns: int, num_rows: int, color: str, width: float) -> None:
    """Lines between the cells of a drawn matrix."""
    for edge in range(1, num_columns):
        axes.axvline(edge - 0.5, color=color, linewidth=width)
    for edge in range(1, num_rows):
        axes.axhline(edge - 0.5, color=color, linewidth=width)


def write_cell(axes: Axes, column: int, row: int, text: str, size: float, dark: bool) -> None:
    """A text into the middle of a cell of a drawn matrix, white on dark."""
    color = "white" if dark else INK
    axes.text(column, row, text, size=size, color=color, ha="center", va="center_baseline")


def printable(text: object) -> str:
    """One line without control characters and lone surrogates."""
    return "".join(char if char.isprintable() else " " for char in str(text))


def one_line(text: object) -> str:
    """A text as one line with single spaces."""
    return " ".join(printable(text).split())


def shorten(text: str, longest: int) -> str:
    """A text as one line of at most so many characters, cut in its middle."""
    line = one_line(text) or "(empty)"
    end = longest // 3  # names of one kind often differ at their end
    return line if len(line) <= longest else f"{line[: longest - end - 1]}…{line[-end:]}"

"""What a sweep found, as tables and a picture."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from mmpeft.experiments.sweep_plan import shown
from mmpeft.reporting import tables
from mmpeft.reporting.canvas import GREY, INK, LINE, PALETTE, WIDTH, new_sheet, shorten
from mmpeft.reporting.report import read_curves
from mmpeft.training.halving_rule import CURVE

Row = Mapping[str, Any]
HEIGHT, LEFT, TOP, NAMES = 900, 120, 126, 480
"""Pixels of the picture, where its axes begin, and the width of the names beside them."""
LONGEST = 42
"""Characters of a setting's name in the picture."""
STYLES = ("-", "--", ":", "-.")
"""Of the lines, where there are more settings than colours."""


def make_table(rows: Sequence[Row]) -> Table:
    """For the terminal, the best first."""
    head, *lines = _cells(rows)
    table = tables.make_table(f"{len(rows)} settings by validation loss", **dict.fromkeys(head, "right"))
    for line in lines:
        table.add_row(*line)
    return table


def markdown(rows: Sequence[Row], command: str) -> str:
    """The same in Markdown, with the command."""
    head, *lines = _cells(rows)
    table = tables.markdown_table(head, lines, ["---:"] * len(head))
    told = "Settings that left early have the loss of the step after which they left."
    return f"{table}\n\n`{command}`\n\n{told}\n"


def _cells(rows: Sequence[Row]) -> list[list[str]]:
    """The heads, and a line for every setting."""
    keys = list(dict.fromkeys(key for row in rows for key in row["values"]))
    several = len(rows[0]["finetunes"]) > 1
    head = [key.rpartition(".")[2] for key in keys]
    lines = [[*head, "validation loss", *(["of its seeds"] if several else []), "after step"]]
    for row in rows:
        values = [shown(row["values"][key]) if key in row["values"] else "" for key in keys]
        seeds = [f"{min(row['val_losses']):.4f} to {max(row['val_losses']):.4f}"] if several else []
        lines.append([*values, f"{row['val_loss']:.4f}", *seeds, str(row["steps"])])
    return lines


def draw(path: Path, curves: Path, rows: Sequence[Row]) -> None:
    """Draws the validation losses by step into a PNG of 1600 x 900 pixels, with a cross where a setting left early.

    Args:
        curves: metrics.csv of the joint run.
        rows: the settings, the best first.
    """
    found = read_curves(curves)
    last = max(row["steps"] for row in rows)
    with new_sheet(WIDTH, HEIGHT) as sheet:
        axes = sheet.axes(LEFT, TOP, WIDTH - LEFT - NAMES, HEIGHT - TOP - 110, labels=INK)
        axes.set_axisbelow(True)
        axes.grid(which="both", color=LINE, linewidth=0.7)
        for number, row in reversed([*enumerate(rows)]):
            color = PALETTE[number % len(PALETTE)]
            style = {"color": color, "linewidth": 2.6 if number == 0 else 1.4, "marker": "o", "markersize": 4}
            for name in row["finetunes"]:
                steps, losses = zip(*found[f"{CURVE}/{name}"], strict=True)
                steps = [step + 1 for step in steps]
                axes.plot(steps, losses, STYLES[number // len(PALETTE) % len(STYLES)], **style)
                if row["steps"] < last and math.isfinite(losses[-1]):
                    axes.plot(steps[-1], losses[-1], "x", color=color, markersize=10, markeredgewidth=2)
        axes.set(xlabel="step", ylabel="validation loss")
        if all(loss > 0 for row in rows for loss in row["val_losses"]):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
        title = f"{len(rows)} settings side by side on one base: a cross is where one left"
        sheet.write(LEFT, 63, title, 12, weight="bold")
        room = (HEIGHT - TOP - 110) / max(len(rows), 12)
        for number, row in enumerate(rows):
            x, y = WIDTH - NAMES + 30, TOP + (number + 0.5) * room
            sheet.box(x, y - 5, 26, 6, PALETTE[number % len(PALETTE)])
            weight, color = ("bold", INK) if number == 0 else ("normal", GREY)
            told = f"{row['val_loss']:.3f}  {shorten(row['setting'], LONGEST)}"
            sheet.write(x + 40, y + 4, told, 7.5, color, weight)
        sheet.save(path)

"""What `continual` found, as tables and a picture."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmpeft.reporting.canvas import GREY, INK, SHADES, new_sheet, write_cell
from mmpeft.reporting.tables import markdown_table

CELL_HEIGHT, LETTER, TOP, MARGIN = 46, 12, 120, 24
"""Pixels of the picture: a row, a letter of a name, the room above the rows, and the rim."""


@dataclass
class Row:
    """One finetune at one time: a row of the table."""

    phase: str
    """The last one that was trained, or `BEFORE`."""
    finetune: str
    trained_in: str
    """The phase that trained the finetune last, or will."""
    run: str | None
    """Directory that it is loaded from; None where that is what the first phase begins from."""
    exact_match: dict[str, float] = field(default_factory=dict)
    """Data set -> share of its questions that are answered right."""
    answers: dict[str, list[str]] = field(default_factory=dict, repr=False)
    """Data set -> what was answered."""


def matrix(names: Sequence[str], rows: Iterable[Row]) -> str:
    """The whole table in Markdown."""
    lines = [
        [
            *((f"after {row.phase}", row.finetune) if row.run else (row.phase, "untrained")),
            *(f"{row.exact_match[name]:.3f}" for name in names),
        ]
        for row in rows
    ]
    return markdown(["", "asked of", *names], lines)


def what_became(lost: Sequence[dict[str, Any]]) -> list[str]:
    """What was forgotten, in Markdown; nothing where no phase comes after one that teaches something."""
    heads = ["data", "learnt_in", "after", "finetune", "was", "is", "forgotten", "other_answers", "questions"]
    lines = [
        [f"{one[head]:.3f}" if isinstance(one[head], float) else str(one[head]) for head in heads]
        for one in lost
    ]
    named = [head.replace("_", " ") for head in heads]
    return ["What became of what was learnt:", markdown(named, lines)] if lost else []


def markdown(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table whose columns are aligned also as plain text."""
    cells = [heads, *lines]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    head, *rows = ([*map(str.ljust, row, widths)] for row in cells)
    return markdown_table(head, rows, ["-" * width for width in widths])


def how_to_ask(rows: Iterable[Row]) -> list[str]:
    """How to ask the right one of several finetunes, in Markdown."""
    by_run: dict[str, list[str]] = {}
    for row in rows:
        by_run.setdefault(row.run or "", []).append(row.finetune)
    return [
        f"After {Path(directory).parent.name} the finetunes stand beside each other; each row of a batch asks its own:"
        f'\n\n```python\nvlm = mmpeft.load("{directory}")\n'
        f"vlm.ask(images, questions, adapter={json.dumps(names)})  # as many of each\n```"
        for directory, names in by_run.items()
        if len(names) > 1
    ]


def draw_matrix(path: Path, names: Sequence[str], rows: Sequence[Row], title: str) -> None:
    """Draws the table into a PNG: the darker, the more is right. A line stands above every phase."""
    phases = [row.phase for row in rows]
    several = {phase for phase in phases if phases.count(phase) > 1}
    labels = [f"{row.phase}: {row.finetune}" if row.phase in several else row.phase for row in rows]
    left, cell = MARGIN + LETTER * max(map(len, labels)), max(130, LETTER * (2 + max(map(len, names))))
    width, height = cell * len(names), CELL_HEIGHT * len(rows)
    values = [[row.exact_match[name] for name in names] for row in rows]
    with new_sheet(left + width + MARGIN, TOP + height + MARGIN) as sheet:
        axes = sheet.axes(left, TOP, width, height, labels=INK)
        axes.imshow(values, SHADES, vmin=0, vmax=1, aspect="auto")
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                write_cell(axes, x, y, f"{value:.3f}", 8, dark=value > 0.4)
        axes.set_yticks(range(len(rows)), labels)
        axes.set_xticks(range(len(names)), names)
        axes.xaxis.tick_top()
        for number in range(1, len(rows)):
            if phases[number - 1] != phases[number]:
                axes.axhline(number - 0.5, color=GREY, linewidth=1)
        sheet.write(MARGIN, MARGIN, f"{title}: right answers", 9, weight="bold", va="top")
        sheet.save(path)

"""Data sets about the images of easy-VQA: its shape questions, and its questions in German.

Images are relative to the data file and must lie in its folder, so each set links the ones it names (a second name
of the same file, no second copy).
"""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmpeft.samples.easy_vqa import SHAPES
from mmpeft.samples.easy_vqa_german import translate
from mmpeft.samples.rows import SPLITS, conversation, read_rows, write_rows

Row = dict[str, Any]


def build_shapes(root: Path, folder: Path) -> None:
    """The questions that a shape answers, with the three shapes as choices; of held-out images one each."""
    splits = {split: _of_shapes(_questions(root, split)) for split in SPLITS}
    splits["test"] = _one_an_image(splits["test"])
    _write(root, folder, splits, "the questions whose answer is a shape; test has one for each image")


def build_german(root: Path, folder: Path) -> None:
    """All questions and answers in German; ids end in -de."""
    splits = {split: [_german(row) for row in _questions(root, split)] for split in SPLITS}
    _write(root, folder, splits, "all questions and answers, translated by rule")


def _questions(root: Path, split: str) -> list[Row]:
    return read_rows(root / "easy-vqa" / f"{split}.jsonl")


def _said(row: Row) -> tuple[str, str]:
    """Question and answer."""
    human, model = row["conversations"]
    return human["value"].removeprefix("<image>\n"), model["value"]


def _of_shapes(rows: Iterable[Row]) -> list[Row]:
    return [{**row, "choices": sorted(SHAPES)} for row in rows if _said(row)[1] in SHAPES]


def _one_an_image(rows: Iterable[Row]) -> list[Row]:
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(row["image"], row)
    return list(first.values())


def _german(row: Row) -> Row:
    return conversation(f"{row['id']}-de", row["task"], *translate(*_said(row)), image=row["image"])


def _write(root: Path, folder: Path, splits: dict[str, list[Row]], told: str) -> None:
    for split, rows in splits.items():
        write_rows(folder / f"{split}.jsonl", rows)
    for image in {row["image"] for rows in splits.values() for row in rows}:
        _link(root / "easy-vqa" / image, folder / image)
    counts = "".join(f"{split}: {len(rows)} questions\n" for split, rows in splits.items())
    (folder / "README.txt").write_text(
        f"Made by mmpeft from easy-VQA by Victor Zhou (MIT licence): {told}.\n\n{counts}"
    )
    shutil.copyfile(root / "easy-vqa" / "PACKAGE-LICENSE.txt", folder / "PACKAGE-LICENSE.txt")


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)

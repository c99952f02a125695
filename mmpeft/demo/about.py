"""What the demo tells of a run: its facts, curves and pictures, its model card, and the examples to click."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmpeft.data.images import load_image
from mmpeft.data.records import CAPTION_TASK
from mmpeft.demo.asked import CAPTION, QUESTION
from mmpeft.demo.source import About, Example, Picture
from mmpeft.files import read_json_lines
from mmpeft.hashing import hash_file
from mmpeft.metrics.intervals import readable
from mmpeft.runs.layout import CARD, PICTURES
from mmpeft.runs.manifest import read_manifest

FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.S)
PICTURE = re.compile(r"^!\[[^\]]*\]\([^)]*\)\n?", re.M)


def about_run(run: Path) -> About:
    """All there is of these in a run's directory."""
    manifest = read_manifest(run)
    files = [run / f"{name}.png" for name in ("report", *PICTURES)]
    card = run / CARD
    return About(
        run.resolve().name,
        {name: str(value) for name, value in {**manifest.facts, **readable(manifest.metrics)}.items()},
        _text_of(card.read_text()) if card.is_file() else "",
        [(file.stem, load_image(file)) for file in files if file.is_file()],
    )


def read_examples(runs: Sequence[Path]) -> list[Example]:
    """The held-out examples of runs that have images and can be asked here; equal ones once. Where more was read than
    images and the question, the same question would be another one."""
    found: dict[tuple[Any, ...], Example] = {}
    for run in runs:
        path = run / "examples" / "examples.jsonl"
        rows = read_json_lines(path) if path.is_file() else []
        for row in rows:
            names = row.get("images") or ([row["image"]] if row["image"] else [])
            if not names or not row.get("alone", True):
                continue
            files = [path.parent / Path(name).name for name in names]
            task = CAPTION if row["task"] == CAPTION_TASK else QUESTION
            question = row.get("asked", row["question"])
            key = *map(hash_file, files), task, question
            if key not in found:
                pictures = [Picture(load_image(file), str(file)) for file in files]
                found[key] = Example(pictures, task, question, row["truth"])
    return list(found.values())


def _text_of(card: str) -> str:
    """The card without what is for the hub, and without pictures, which are shown beside it."""
    return PICTURE.sub("", FRONT_MATTER.sub("", card)).strip()

"""What the demo tells of a run: its facts, curves and pictures, its model card, and the examples to click."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from mmpeft.data.images import load_image
from mmpeft.data.records import CAPTION_TASK
from mmpeft.demo.asked import CAPTION, QUESTION
from mmpeft.demo.source import About, Example
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
    """The held-out examples of runs that have an image; equal ones once."""
    found: dict[tuple[str, str, str], Example] = {}
    for run in runs:
        path = run / "examples" / "examples.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        for row in rows:
            if not row["image"]:
                continue
            file = path.parent / Path(row["image"]).name
            task = CAPTION if row["task"] == CAPTION_TASK else QUESTION
            key = hash_file(file), task, row["question"]
            if key not in found:
                found[key] = Example(load_image(file), task, row["question"], row["truth"])
    return list(found.values())


def _text_of(card: str) -> str:
    """The card without what is for the hub, and without pictures, which are shown beside it."""
    return PICTURE.sub("", FRONT_MATTER.sub("", card)).strip()

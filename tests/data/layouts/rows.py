"""How layouts of rows are written: rows as JSONL beside two small images, and the records that they mean."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.data.layouts.layout import Layout
from tests.data.layouts.writing import clip, png

A, B = "a.png", "b.png"
CLIP = "clip.mp4"
NUM_FRAMES = 12
"""Of `CLIP`."""
CAPTION, CLASS = "Describe this image.", "What is in this image?"
SAID_NOTHING = {"system": None, "choices": None, "references": None, "task": None}


def writes(
    rows: list[Any], file: str = "data.jsonl", images: tuple[str, ...] = (A, B)
) -> Callable[[Path], str]:
    """Writes rows and images; a name that ends in ``.json`` holds one array on one line."""

    def write(folder: Path) -> str:
        for name in images:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(clip() if name == CLIP else png())
        lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        (folder / file).write_text(json.dumps(rows) if file.endswith(".json") else lines + "\n")
        return file

    return write


def meant(*texts: str | None, images: tuple = (A,), **told: Any) -> dict[str, Any]:
    """A record: question, answer, question, ...; where it has images and no marker, those come first."""
    turns = list(zip(texts[::2], texts[1::2], strict=True))
    if images and not any("<image>" in str(question) for question, _ in turns):
        turns[0] = ("<image>" * len(images) + str(turns[0][0]), turns[0][1])
    return {**SAID_NOTHING, "images": list(images), "turns": turns, **told}


def read(name: str, row: Any, *records: dict[str, Any], file: str = "data.jsonl", **told: Any) -> Layout:
    """A layout of one row (or a list of rows) that is read as ``records``."""
    files = told.pop("files", (A, B))
    needs = "av" if CLIP in files else None
    rows = row if isinstance(row, list) else [row]
    return Layout(name, writes(rows, file, files), records=list(records), settings=told, needs=needs)


def refused(name: str, row: Any, because: str, **told: Any) -> Layout:
    """A layout of one row that is refused."""
    files = told.pop("files", (A, B))
    needs = "av" if CLIP in files else None
    return Layout(name, writes([row], "data.jsonl", files), refused=because, settings=told, needs=needs)


def frames(*numbers: int) -> tuple[str, ...]:
    """Names of frames of `CLIP`."""
    return tuple(f"{CLIP}#frame={number}" for number in numbers)


def said(
    *texts: Any, keys: tuple[str, str] = ("from", "value"), roles: tuple[str, str] = ("human", "gpt")
) -> list:
    """Turns under one pair of keys."""
    return [{keys[0]: roles[number % 2], keys[1]: text} for number, text in enumerate(texts)]


def chat(*texts: Any) -> list:
    """The same as OpenAI's messages."""
    return said(*texts, keys=("role", "content"), roles=("user", "assistant"))

"""The lines of the data sets made here, and which split a thing belongs to."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

SPLITS = ("train", "val", "test")


def conversation(
    id: str,
    task: str,
    question: str,
    answer: str,
    *,
    image: str | None = None,
    choices: Sequence[str] | None = None,
) -> dict[str, Any]:
    """A row in LLaVA's format; ``choices`` are the allowed answers, if they are few."""
    given = {"id": id, "image": image, "task": task, "choices": choices}
    asked = f"<image>\n{question}" if image else question
    return {
        **{key: value for key, value in given.items() if value is not None},
        "conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}],
    }


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line, letters as they are."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """What `write_rows` wrote."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def draw(key: str) -> float:
    """A number in [0, 1) that depends on the key alone: the same on every machine and in every order."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) / 2**64


def split_of(key: str, val: float, test: float) -> str:
    """The split of a key, given which shares of all keys are held out."""
    return split_at(draw(key), val, test)


def split_at(place: float, val: float, test: float) -> str:
    """The split of a place, given how much from the first on is held out, in shares of 1 or in numbers."""
    return "test" if place < test else "val" if place < test + val else "train"

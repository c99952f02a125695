"""One layout of a public tool or data set, with small contents of our own, and what must come of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Layout:
    """A layout and the records that it means, or why it is refused."""

    name: str
    """Who writes it and how, as the table in docs/data.md calls it."""
    write: Callable[[Path], str]
    """Writes its files into an empty folder and gives what `data.train` is set to, relative to the folder."""
    records: list[dict[str, Any]] | None = None
    """What is meant: per record the keys of `Record` that matter here, "images" as names relative to the folder."""
    refused: str | None = None
    """Else what the refusal must say: the key or file that is not understood."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Further settings of `load_records` that a user gives, such as columns."""
    needs: str | None = None
    """A package of an extra, without which it is not read."""

"""What every file format gives: rows with their places, and a `DataError` in place of a row that cannot be read."""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmpeft.errors import RefusedError

Place = int | str
"""Where a row stands in its file: its line, or "element 17" of a JSON array."""
Rows = Iterator[tuple[Place, Any]]


class DataError(RefusedError):
    """A data set cannot be used; the message names file, line and id, what was found and what to do."""


@dataclass(frozen=True)
class DataFile:
    """Rows that are read one after the other: a file, several that belong together, or a folder of images."""

    path: Path
    """What messages call it."""
    read: Callable[[], Rows]
    root: Path
    """The folder that its image names are relative to."""
    parts: tuple[Path, ...]
    """Every file whose bytes are the rows: they are the same as long as these are. Of a folder of images itself."""
    told: tuple[str, ...] = ()
    """What is to be known of it, in whole sentences."""

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def stem(self) -> str:
        return self.path.stem


def read_rows(file: DataFile) -> Rows:
    """(place, row) of every row; a `DataError` stands for one that cannot be read."""
    place: Place = "start"
    try:
        for place, row in file.read():
            yield place, row
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:  # a cut or damaged .gz among them
        yield place, DataError(f"what follows cannot be read ({error}); write or fetch the file again")

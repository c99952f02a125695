"""Hashes that were met: a few bytes each, and of very many a file. A million ids or paths as text, or as a set of
Python's, would take 100 MB."""

from array import array
from bisect import bisect_left
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqlite3 import Cursor

RECENT = 2**15
"""Hashes that are held as a set, at least; more than a sixteenth of all are never, so that sorting stays linear."""
HELD = 2**17
"""Hashes that are held in memory; of more, all lie on the disk, which takes two microseconds each."""
CACHE_KB = 2000
"""Memory for what lies there."""


class HashSet:
    """A growing set of 64-bit hashes, as `hash` gives them: the older ones sorted in an array, the latest in a set."""

    def __init__(self) -> None:
        self._recent: set[int] = set()
        self._older = array("q")
        self._most = RECENT
        self._size = 0
        self._is_on_disk = False

    def __len__(self) -> int:
        return self._size

    def add(self, own: int) -> bool:
        """Whether it is new."""
        if self._is_on_disk:
            is_new = self._insert(own)
            self._size += is_new
            return is_new
        if own in self._recent:
            return False
        at = bisect_left(self._older, own)
        if at < len(self._older) and self._older[at] == own:
            return False
        self._recent.add(own)
        self._size += 1
        if len(self._recent) >= self._most:
            self._sort()
        return True

    def _sort(self) -> None:
        import numpy as np  # here, so that small data and --help need none

        self._older.extend(self._recent)
        self._recent = set()
        if len(self._older) >= HELD:
            self._file.executemany("INSERT INTO met VALUES (?)", ((own,) for own in self._older))
            self._older, self._is_on_disk = array("q"), True
            return
        np.frombuffer(self._older, np.int64).sort()
        self._most = max(RECENT, len(self._older) // 16)

    def _insert(self, own: int) -> bool:
        return self._file.execute("INSERT OR IGNORE INTO met VALUES (?)", (own,)).rowcount > 0

    @cached_property
    def _file(self) -> "Cursor":
        """A nameless file that goes with the process; nobody reads it after that, so that nothing need be safe."""
        import sqlite3  # here, as few data sets are so large

        file = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        for setting in (f"cache_size = -{CACHE_KB}", "journal_mode = OFF", "synchronous = OFF"):
            file.execute(f"PRAGMA {setting}")
        file.execute("CREATE TABLE met (own INTEGER PRIMARY KEY)")
        return file.execute("BEGIN")

"""Hashes that were met, in 8 bytes each: a million ids or paths as text, or as a set of Python's, would take 100 MB."""

from array import array
from bisect import bisect_left

RECENT = 2**15
"""Hashes that are held as a set, at least; more than a sixteenth of all are never, so that sorting stays linear."""


class HashSet:
    """A growing set of 64-bit hashes, as `hash` gives them: the older ones sorted in an array, the latest in a set."""

    def __init__(self) -> None:
        self._recent: set[int] = set()
        self._older = array("q")
        self._most = RECENT

    def __len__(self) -> int:
        return len(self._older) + len(self._recent)

    def add(self, own: int) -> bool:
        """Whether it is new."""
        if own in self._recent:
            return False
        at = bisect_left(self._older, own)
        if at < len(self._older) and self._older[at] == own:
            return False
        self._recent.add(own)
        if len(self._recent) >= self._most:
            self._sort()
        return True

    def _sort(self) -> None:
        import numpy as np  # here, so that small data and --help need none

        self._older.extend(self._recent)
        self._recent = set()
        np.frombuffer(self._older, np.int64).sort()
        self._most = max(RECENT, len(self._older) // 16)

"""What is wrong with the rows of a data set, so that one error tells all of it."""

import bisect

from mmpeft.data.formats import DataError

MAX_LISTED = 20
"""Most problems written out in one error; the rest is counted."""


class Problems:
    """All are counted, and the first in the order of the rows are told."""

    def __init__(self) -> None:
        self.count = 0
        self._told: list[tuple[int, str]] = []

    def add(self, number: int, told: str) -> None:
        """``number`` is the row's."""
        self.count += 1
        bisect.insort(self._told, (number, told))
        del self._told[MAX_LISTED:]

    @property
    def first(self) -> str:
        """The first one that is told."""
        return self._told[0][1]

    def told(self, what: str, hint: str = "") -> str:
        """The first ones, and how many there are."""
        rest = f"\n  and {self.count - MAX_LISTED} more" if self.count > MAX_LISTED else ""
        lines = [f"{what}: {self.count} problem(s){hint}", *(told for _, told in self._told)]
        return "\n  ".join(lines) + rest

    def refuse(self, what: str, hint: str = "") -> None:
        """Raises:
        DataError: there are any.
        """
        if self.count:
            raise DataError(self.told(what, hint))

"""Shares of a run's processes: which rows of a batch, and which batches of questions, are this one's.

Every process knows the whole plan and takes its own part of it, so that nothing is sent before a step, and a checkpoint
of some processes is that of any other number.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

Item = TypeVar("Item")


class Share(NamedTuple):
    """One of a run's processes."""

    rank: int = 0
    """Its number, from 0."""
    size: int = 1
    """How many there are."""

    def of_rows(self, tokens: Sequence[int], first: int = 0) -> list[int]:
        """Numbers of the rows of a batch that are this process's, in order: a function of the batch alone. Every row
        goes to the process that has the fewest tokens so far, the longest rows first.

        Args:
            tokens: of each row.
            first: the process that is asked first among equals. Finetunes side by side begin with different ones, as
                several single rows would otherwise be those of one process.
        """
        if self.size == 1:
            return list(range(len(tokens)))
        loads, own = [0] * self.size, []
        turns = [(first + turn) % self.size for turn in range(self.size)]
        for row in sorted(range(len(tokens)), key=lambda row: (-tokens[row], row)):
            rank = min(turns, key=lambda rank: loads[rank])
            loads[rank] += tokens[row]
            if rank == self.rank:
                own.append(row)
        return sorted(own)

    def of_items(self, items: Sequence[Item]) -> Sequence[Item]:
        """Its part of what can be done in any order: nothing twice, nothing left out."""
        return items[self.rank :: self.size]

"""The plan of an epoch: which examples share a row and which rows a batch. It knows lengths, not tokens."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from mmpeft.data.packing import Rows, plan_rows
from mmpeft.data.sequences import Lazy
from mmpeft.errors import require_positive

BATCHES_SORTED_TOGETHER = 32
"""Rows of similar length share a batch within windows of about this many batches, to pad less."""


@dataclass
class PackingConfig:
    """How conversations fill rows and batches."""

    batch_size: int = 32
    """Conversations per batch, on average: rows are not torn apart."""
    max_conversations: int = 16
    """Most conversations in one row; 1 switches packing off."""
    max_length: int = 1024
    """Most tokens in one row, image features included."""

    def __post_init__(self):
        for name in ("batch_size", "max_conversations", "max_length"):
            require_positive(f"packing.{name}", getattr(self, name))


class Plan(Lazy[list[list[int]]]):
    """Batches of rows of example numbers, 16 bytes an example.

    Args:
        rows: of all batches.
        sizes: (batches,) rows of each.
    """

    def __init__(self, rows: Rows, sizes: np.ndarray):
        self.rows, self._ends = rows, np.cumsum(sizes)

    def __len__(self) -> int:
        return len(self._ends)

    def item(self, number: int) -> list[list[int]]:
        start = self._ends[number - 1] if number else 0
        return [self.rows.item(row) for row in range(start, self._ends[number])]

    def largest(self, lengths: np.ndarray, count: int) -> list[int]:
        """Numbers of the batches with the most tokens, padding included, as if no conversations shared any.

        Args:
            lengths: tokens of each example.
            count: how many batches, at most.
        """
        starts = np.concatenate([[0], self._ends[:-1]])
        widths = np.add.reduceat(lengths[self.rows.numbers], self.rows.starts)
        tokens = np.maximum.reduceat(widths, starts) * (self._ends - starts)
        return np.argsort(tokens, kind="stable")[-count:].tolist()


def plan_batches(
    keys: Sequence[Hashable] | np.ndarray,
    lengths: Sequence[int] | np.ndarray,
    packing: PackingConfig,
    order: Sequence[int] | None = None,
    shuffle: Callable[[list[int]], None] = lambda numbers: None,
) -> Plan:
    """Examples packed by key, rows of similar length together.

    Args:
        keys: examples of one key may share a row, see `row_keys`.
        lengths: tokens of each, at least one example.
        packing: the sizes.
        order: in which the examples fill rows; all as they come by default.
        shuffle: of the numbers of rows and then of batches, in place.

    Returns:
        As many batches whatever the order.
    """
    lengths = np.asarray(lengths)
    most = min(packing.max_conversations, packing.batch_size)
    wanted = range(len(lengths)) if order is None else order
    rows = plan_rows(keys, lengths, wanted, packing.max_length, most)
    rows = rows.take(_shuffled(len(rows), shuffle))
    rows = rows.take(_similar_together(rows, lengths, BATCHES_SORTED_TOGETHER * packing.batch_size))
    sizes = split_evenly(rows.sizes.tolist(), max(1, round(len(lengths) / packing.batch_size)))
    batches = _shuffled(len(sizes), shuffle)
    in_batches = Rows(np.arange(len(rows)), np.asarray(sizes)).take(batches)
    return Plan(rows.take(in_batches.numbers), in_batches.sizes)


def _shuffled(count: int, shuffle: Callable[[list[int]], None]) -> np.ndarray:
    numbers = list(range(count))
    shuffle(numbers)
    return np.array(numbers, np.int64)


def _similar_together(rows: Rows, lengths: np.ndarray, window: int) -> np.ndarray:
    """Numbers of rows, sorted by length within windows of ``window`` conversations, up and down by turns, so that where
    two windows meet rows are of similar length as well."""
    windows = (np.cumsum(rows.sizes) - rows.sizes) // window
    tokens = np.add.reduceat(lengths[rows.numbers], rows.starts)
    return np.lexsort((np.where(windows % 2, -tokens, tokens), windows))


def split_evenly(sizes: Sequence[int], num_batches: int) -> list[int]:
    """Cuts rows of so many conversations, in order, into exactly ``num_batches`` runs of about equally many
    conversations, none empty.

    Returns:
        The rows of each.
    """
    total = sum(sizes)
    batches = [0]
    done = 0
    for number, size in enumerate(sizes):
        share_full = done + size / 2 > len(batches) * total / num_batches
        needed_later = len(sizes) - number <= num_batches - len(batches)
        if batches[-1] and len(batches) < num_batches and (share_full or needed_later):
            batches.append(0)
        batches[-1] += 1
        done += size
    return batches

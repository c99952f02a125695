"""Sequence packing: several questions about one image in one row, exactly as if each had a row of its own.

A packed row is a shared prefix (the image and what else its conversations begin with) followed by one segment per
conversation. A segment sees the prefix and itself, and its positions go on from the prefix::

    ids        [INST] <Img> . . </Img> [vqa] | what color ? [/INST] | is it red ? [/INST]
    segments      0     0   0 0   0      0   |  1    1    1   1     | 2  2  2   2   2
    positions     0     1   2 3   4      5   |  6    7    8   9     | 6  7  8   9   10

Conversations without image pack the same way; they share what they happen to begin with.
"""

import bisect
from array import array
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np

from mmpeft.data.sequences import Lazy
from mmpeft.data.template import IGNORE_INDEX, IMAGE_TOKEN, ChoiceSet, Encoded

PREFIX = 0
"""The segment that every other segment of its row sees."""


class Role(IntEnum):
    """What a conversation is there for."""

    ANSWER = 0
    """Its answer is to be learnt or read."""
    RIGHT = 1
    """The right one of its question's choices."""
    WRONG = 2
    """A wrong one of them."""
    CHOICE = 3
    """One of the choices of a question whose answer nobody told."""


@dataclass
class PackedRow:
    """One row of a batch. The lists have one entry per token."""

    ids: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    images: list[Any] = field(default_factory=list)
    """The image of every run of image tokens, in the order of the ids."""
    image_tokens: list[int] | None = None
    """Of each image; None where all have as many."""
    roles: list[Role] = field(default_factory=list)
    """What each of its conversations is there for, in the order of the segments."""

    def append(self, part: Encoded, start: int, stop: int, segment: int) -> None:
        self.ids += part.ids[start:stop]
        self.targets += part.targets[start:stop]
        self.positions += range(start, stop)
        self.segments += [segment] * (stop - start)


def pack(conversations: Sequence[Encoded]) -> PackedRow:
    """Packs conversations about the same images into one row; the k-th becomes segment k + 1."""
    row = PackedRow()
    prefix = shared_prefix(conversations) if len(conversations) > 1 else 0
    row.append(conversations[0], 0, prefix, PREFIX)
    for segment, conversation in enumerate(conversations, start=PREFIX + 1):
        row.append(conversation, prefix, len(conversation.ids), segment)
    shared = conversations[0].images_in(prefix)
    row.images = _in_order([own.images for own in conversations], shared)
    if conversations[0].image_tokens is not None:
        row.image_tokens = _in_order([own.image_tokens or [] for own in conversations], shared)
    row.roles = [Role.ANSWER] * len(conversations)
    return row


def pack_choices(choices: ChoiceSet) -> PackedRow:
    """One question's choices in one row: the prompt, its image included, is computed once for all of them."""
    row = pack(choices.conversations)
    others = Role.CHOICE if choices.right is None else Role.WRONG
    row.roles = [
        Role.RIGHT if place == choices.right else others for place in range(len(choices.conversations))
    ]
    return row


def shared_prefix(conversations: Sequence[Encoded]) -> int:
    """Leading tokens that all conversations share and that carry no target: each target needs a place of its
    own, since conversations may go on differently from the same prefix. It never ends inside an image."""
    first, *others = (conversation.ids for conversation in conversations)
    limit = min(first_target(conversation) for conversation in conversations)
    limit = min(limit, *(len(conversation.ids) - 1 for conversation in conversations))
    while limit > 0 and first[limit - 1] == first[limit] == IMAGE_TOKEN:
        limit -= 1
    for position in range(limit):
        if any(ids[position] != first[position] for ids in others):
            return position
    return limit


class Rows(Lazy[list[int]]):
    """Rows of example numbers, in two arrays: 16 bytes an example.

    Args:
        numbers: (examples,) int64, row by row.
        sizes: (rows,) int64, examples of each row.
    """

    def __init__(self, numbers: np.ndarray, sizes: np.ndarray):
        self.numbers, self.sizes = numbers, sizes
        self.starts = np.cumsum(sizes) - sizes

    def __len__(self) -> int:
        return len(self.sizes)

    def item(self, number: int) -> list[int]:
        start = self.starts[number]
        return self.numbers[start : start + self.sizes[number]].tolist()

    def take(self, rows: np.ndarray) -> "Rows":
        """Those rows, in that order."""
        sizes = self.sizes[rows]
        places = np.repeat(self.starts[rows] - (np.cumsum(sizes) - sizes), sizes) + np.arange(sizes.sum())
        return Rows(self.numbers[places], sizes)


def plan_rows(
    keys: Sequence[Hashable] | np.ndarray,
    lengths: Sequence[int] | np.ndarray,
    order: Sequence[int],
    max_length: int,
    max_conversations: int,
) -> Rows:
    """Which examples share a row: those of one key, best fit, at most ``max_length`` tokens and
    ``max_conversations`` each. Lengths count every conversation whole, so a row is never longer than planned.

    Returns:
        Every example once; they fill rows in the given ``order``.
    """
    wanted, lengths = np.asarray(order, np.int64), np.asarray(lengths)
    _, firsts, group_of, counts = np.unique(
        _as_numbers(keys)[wanted], return_index=True, return_inverse=True, return_counts=True
    )
    members = wanted[np.argsort(firsts[group_of], kind="stable")]  # group by group, as their first ones come
    numbers, sizes = array("q"), array("q")
    start = 0
    for size in counts[np.argsort(firsts)].tolist():
        own = members[start : start + size]
        start += size
        for row in _best_fit(lengths[own].tolist(), max_length, max_conversations):
            numbers.extend(own[row].tolist())
            sizes.append(len(row))
    return Rows(np.frombuffer(numbers, np.int64), np.frombuffer(sizes, np.int64))


def _as_numbers(keys: Sequence[Hashable] | np.ndarray) -> np.ndarray:
    """Equal keys as equal numbers."""
    if isinstance(keys, np.ndarray):
        return keys
    known: dict[Hashable, int] = {}
    return np.array([known.setdefault(key, len(known)) for key in keys], np.int64)


def _best_fit(lengths: list[int], max_length: int, most: int) -> list[list[int]]:
    """Rows of numbers of ``lengths``."""
    if len(lengths) == 1:
        return [[0]]
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (tokens still free, row), sorted
    for index, length in enumerate(lengths):
        place = bisect.bisect_left(open_rows, (length, -1))
        if place == len(open_rows):
            free, row = max_length, len(rows)
            rows.append([])
        else:
            free, row = open_rows.pop(place)
        rows[row].append(index)
        if len(rows[row]) < most and free > length:
            bisect.insort(open_rows, (free - length, row))
    return rows


def first_target(conversation: Encoded) -> int:
    """The first position that carries loss; the number of positions where none does."""
    for position, target in enumerate(conversation.targets):
        if target != IGNORE_INDEX:
            return position
    return len(conversation.targets)


def _in_order(images: Sequence[list[Any]], shared: int) -> list[Any]:
    """Of what stands for the images of conversations the first ``shared`` once, then the later ones of every
    conversation."""
    return [*images[0][:shared], *(image for own in images for image in own[shared:])]

"""Reuse (prefix caching): keys and values of prompts, and projected images, found again by what they are made of.

A key says by hashes all that the numbers depend on, and no names: another finetune of the same name has other keys.
Base rows, and those of activated finetunes before their invocation, have the base's.
"""

import hashlib
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Generic, NamedTuple, TypeVar

import torch

from mmpeft.data.spans import IMAGE_TOKEN
from mmpeft.inference.chunks import KeysValues

Value = TypeVar("Value")
BLOCK = 8
"""Prefixes are kept in multiples of so many columns."""


class PrefixKey(NamedTuple):
    """What the keys and values of a prefix depend on; every field is a hash of content."""

    base: str
    adapter: str
    """Of its config and tensors; empty where none has acted yet."""
    projector: str
    """Empty before the first image."""
    images: str
    """Of all images that have begun."""
    tokens: str
    """Of all columns, virtual ones among them, and which are of images."""


class ImageKey(NamedTuple):
    """What the projected features of an image depend on."""

    encoder: str
    projector: str
    adapter: str
    """Of a finetune that changes images before they are projected; else empty."""
    image: str


class Identity(NamedTuple):
    """Hashes of what answers a row."""

    base: str
    encoder: str
    adapter: str
    projector: str
    changes_images: bool
    """Whether the finetune changes features before they are projected."""
    activated: bool
    """Whether it acts from its invocation tokens on alone."""


def prefix_keys(
    ids: Sequence[int],
    images: Sequence[str],
    sizes: Sequence[int],
    acts_from: int,
    identity: Identity,
    block: int,
) -> list[PrefixKey]:
    """The keys of all prefixes of a row that end at a multiple of ``block`` columns.

    Args:
        ids: of every column, `IMAGE_TOKEN` at images'; virtual tokens have a negative one of their own.
        images: the content's hash of every image, in order.
        sizes: columns of every image.
        acts_from: the first column that the finetune changes; ``len(ids)`` where it changes none.
        identity: of the row.
        block: columns.
    """
    keys: list[PrefixKey] = []
    tokens, begun, starts = hashlib.sha256(), 0, [0, *accumulate(sizes)][: len(images)]
    for end in range(block, len(ids) + 1, block):
        part = ids[end - block : end]
        tokens.update(str(part).encode())
        begun += part.count(IMAGE_TOKEN)
        shown = images[: bisect_left(starts, begun)]
        keys.append(
            PrefixKey(
                identity.base,
                identity.adapter if end > acts_from else "",
                identity.projector if shown else "",
                hashlib.sha256(str(list(shown)).encode()).hexdigest() if shown else "",
                tokens.hexdigest(),
            )
        )
    return keys


class Latest(Generic[Value]):
    """Values by key, the latest used that fit into so many bytes.

    Args:
        max_bytes: of all together.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes, self.bytes = max_bytes, 0
        self.hits = self.misses = 0
        self._values: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()

    def get(self, key: Hashable) -> Value | None:
        """The value, which is the latest used from now on."""
        if key not in self._values:
            self.misses += 1
            return None
        self.hits += 1
        self._values.move_to_end(key)
        return self._values[key][0]

    def put(self, key: Hashable, value: Value, nbytes: int) -> None:
        """Keeps a value of so many bytes, which is the latest used; `trim` is to follow."""
        if key in self._values:
            self.bytes -= self._values.pop(key)[1]
        self._values[key] = value, nbytes
        self.bytes += nbytes

    def trim(self) -> list[Value]:
        """Takes out what is too much, and gives it."""
        gone: list[Value] = []
        while self.bytes > self.max_bytes:
            _, (value, freed) = self._values.popitem(last=False)
            self.bytes -= freed
            gone.append(value)
        return gone


@dataclass(eq=False)
class _Run:
    """Some columns of a prefix, behind those of another run."""

    start: int
    layers: list[KeysValues]
    """(key heads, columns, head dim) of every layer, from column ``start`` on"""
    keys: list[PrefixKey]
    """Of the prefixes that end in it."""
    before: "_Run | None"


class PrefixCache:
    """Keys and values of prefixes. One that begins like another shares its columns.

    Args:
        max_bytes: of all together.
        block: prefixes end at multiples of so many columns.
    """

    def __init__(self, max_bytes: int, block: int = BLOCK):
        self.block = block
        self._runs = Latest[_Run](max_bytes)
        self._ends: dict[PrefixKey, _Run] = {}
        self._coming: set[PrefixKey] = set()
        self.asked_columns = self.found_columns = 0

    @property
    def bytes(self) -> int:
        return self._runs.bytes

    def known(self, keys: Sequence[PrefixKey]) -> int:
        """How many of a row's prefixes, the shortest first, are kept."""
        return next((n for n in range(len(keys), 0, -1) if keys[n - 1] in self._ends), 0)

    def find(self, keys: Sequence[PrefixKey]) -> tuple[int, list[KeysValues]]:
        """The longest prefix that is kept: its columns, and their keys and values in every layer."""
        columns = self.known(keys) * self.block
        self.asked_columns += len(keys) * self.block
        self.found_columns += columns
        if not columns:
            return 0, []
        last = self._ends[keys[columns // self.block - 1]]
        parts, end = [], columns
        for run in _chain(last):
            parts.append((run, end - run.start))
            end = run.start
        self._touch(last)
        parts.reverse()
        layers = range(len(last.layers))
        return columns, [_joined([(run.layers[layer], size) for run, size in parts]) for layer in layers]

    def put(self, keys: Sequence[PrefixKey], layers: Sequence[KeysValues]) -> None:
        """Keeps the longest of these prefixes with all that are shorter.

        Args:
            keys: of a row, the shortest first.
            layers: (key heads, columns, head dim) of every layer, for at least the columns of the last key.
        """
        known = self.known(keys)
        if known == len(keys):
            return
        start, stop = known * self.block, len(keys) * self.block
        own = [(keys_[:, start:stop].clone(), values[:, start:stop].clone()) for keys_, values in layers]
        run = _Run(start, own, list(keys[known:]), self._ends[keys[known - 1]] if known else None)
        if _nbytes(run) > self._runs.max_bytes:  # it would leave no place for any other
            return
        self._ends |= dict.fromkeys(run.keys, run)
        self._touch(run)
        for gone in self._runs.trim():
            for key in gone.keys:
                del self._ends[key]

    def begin(self, keys: Sequence[PrefixKey]) -> bool:
        """Says that a row's prefixes are going to be computed; False where another row is computing the first that is
        not kept, so that waiting is cheaper."""
        known = self.known(keys)
        if known < len(keys) and keys[known] in self._coming:
            return False
        self._coming |= {*keys[known:]}
        return True

    def end(self, keys: Sequence[PrefixKey]) -> None:
        """They are computed, or will not be."""
        self._coming -= {*keys}

    def _touch(self, last: _Run) -> None:
        """What is used together is used from its end on: no run leaves before those behind it."""
        for run in _chain(last):
            self._runs.put(run, run, _nbytes(run))


def _nbytes(run: _Run) -> int:
    return sum(each.nbytes for pair in run.layers for each in pair)


def _chain(last: _Run) -> Iterator[_Run]:
    run: _Run | None = last
    while run is not None:
        yield run
        run = run.before


def _joined(parts: Sequence[tuple[KeysValues, int]]) -> KeysValues:
    """So many columns of every run, one behind the other."""
    keys = torch.cat([keys[:, :size] for (keys, _), size in parts], 1)
    return keys, torch.cat([values[:, :size] for (_, values), size in parts], 1)

"""Long sequences that hold nothing themselves: a part of another one, and several one after the other."""

import bisect
from abc import abstractmethod
from array import array
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain
from typing import Any, TypeVar, overload

Item = TypeVar("Item")


class Lazy(Sequence[Item]):
    """A sequence whose items are made one at a time, when they are asked for; a slice of it is as lazy."""

    @abstractmethod
    def item(self, number: int) -> Item:
        """The item of a number from 0 to below the length."""

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> "Lazy[Item]": ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Part(*self._part(index))
        number = index + len(self) if index < 0 else index
        if not 0 <= number < len(self):
            raise IndexError(f"{index} of a sequence of {len(self)}")
        return self.item(number)

    def __iter__(self) -> Iterator[Item]:
        return map(self.item, range(len(self)))

    def __add__(self, other: Sequence[Item]) -> "Lazy[Item]":
        return Chained([self, other])

    def _part(self, index: slice) -> tuple[Sequence[Item], Sequence[int]]:
        return self, range(len(self))[index]


class Part(Lazy[Item]):
    """Some items of another sequence, by their numbers."""

    def __init__(self, whole: Sequence[Item], numbers: Sequence[int]):
        self.whole, self.numbers = whole, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def item(self, number: int) -> Item:
        return self.whole[self.numbers[number]]

    def _part(self, index: slice) -> tuple[Sequence[Item], Sequence[int]]:
        return self.whole, self.numbers[index]


class Chained(Lazy[Item]):
    """The items of several sequences, one sequence after the other."""

    def __init__(self, parts: Sequence[Sequence[Item]]):
        self.parts = [
            each for part in parts for each in (part.parts if isinstance(part, Chained) else [part])
        ]
        self._ends = list(accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def item(self, number: int) -> Item:
        place = bisect.bisect_right(self._ends, number)
        return self.parts[place][number - self._ends[place] + len(self.parts[place])]

    def __iter__(self) -> Iterator[Item]:
        return chain.from_iterable(self.parts)


def pick(items: Sequence[Item], numbers: Sequence[int]) -> Part[Item]:
    """Some items, by their numbers."""
    if isinstance(items, Part):
        return Part(items.whole, array("q", [items.numbers[number] for number in numbers]))
    return Part(items, array("q", numbers))


def parts_of(items: Sequence[Item]) -> list[Sequence[Item]]:
    """The sequences that one is made of, in order."""
    return list(items.parts) if isinstance(items, Chained) else [items]

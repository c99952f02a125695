"""What is to know of a data set at a glance: counts that grow row by row and hold no row, and a table of them."""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.table import Table

from mmpeft.data.hash_set import HashSet
from mmpeft.data.records import Record
from mmpeft.reporting.tables import make_table
from mmpeft.tools.image_survey import ImageSurvey

NAMED_FORMATS = 4
"""Formats that are named, the most frequent ones."""


@dataclass
class DataFacts:
    """Of one data set."""

    rows: int = 0
    conversations: int = 0
    turns: int = 0
    without_image: int = 0
    answers: Counter[int] = field(default_factory=Counter)
    """Characters of an answer -> answers."""
    repeated: int = 0
    """Conversations that say what an earlier one said."""
    ids_used_twice: set[int] = field(default_factory=set)
    """Hashes of ids that several conversations have."""
    _ids: HashSet = field(default_factory=HashSet)
    _said: HashSet = field(default_factory=HashSet)
    """Of all that each conversation says but for its id and place."""

    def add(self, record: Record) -> None:
        self.conversations += 1
        self.turns += len(record["turns"])
        self.without_image += not record["images"]
        for _, answer in record["turns"]:
            self.answers[len(answer or "")] += 1
        self.repeated += not self._said.add(hash(_content(record)))
        if not self._ids.add(own := hash(record["id"])):
            self.ids_used_twice.add(own)


def _content(record: Record) -> tuple:
    told = tuple(record["images"]), tuple(record["turns"]), record["task"], record.get("system")
    return *told, tuple(record.get("choices", ())), tuple(record.get("references", ()))


def spread(counts: Mapping[int, int]) -> str:
    """Numbers of which each has a count: the smallest, the largest and the median."""
    if not counts:
        return "-"
    middle, passed = (sum(counts.values()) + 1) // 2, 0
    for number in sorted(counts):
        passed += counts[number]
        if passed >= middle:
            break
    return f"{min(counts):,} to {max(counts):,}, median {number:,}"


class Sampled:
    """So many records drawn evenly from a stream of unknown length, the same at every start."""

    def __init__(self, most: int):
        self.most, self._met, self._random = most, 0, random.Random(0)
        self._kept: list[tuple[int, Record]] = []

    def add(self, record: Record) -> None:
        self._met += 1
        if len(self._kept) < self.most:
            self._kept.append((self._met, record))
        elif (place := self._random.randrange(self._met)) < self.most:
            self._kept[place] = self._met, record

    @property
    def records(self) -> list[Record]:
        """In the order of the data."""
        return [record for _, record in sorted(self._kept, key=lambda own: own[0])]


def facts_table(
    facts: DataFacts, images: ImageSurvey, source: str, further: Sequence[tuple[str, str]]
) -> Table:
    """Args:
    further: more lines, such as of tokens.
    """
    table = make_table("", **{source: "left", "": "right"})
    sizes = [("width", 0), ("height", 1)] if images.sizes else []
    lines = [
        ("rows", f"{facts.rows:,}"),
        ("conversations, questions in them", f"{facts.conversations:,}, {facts.turns:,}"),
        ("conversations without an image", f"{facts.without_image:,}"),
        ("conversations that say what another says", f"{facts.repeated:,}"),
        ("characters of an answer", spread(facts.answers)),
        ("images named, different names", f"{images.named:,}, {images.distinct:,}"),
        ("images that cannot be used", f"{len(images.bad):,}"),
        ("formats" if images.sizes else "endings", _most_frequent(images.formats)),
        *((f"{name} in pixels", spread(_side(images.sizes, side))) for name, side in sizes),
        *further,
    ]
    for line in lines:
        table.add_row(*line)
    return table


def _side(sizes: Mapping[tuple[int, int], int], side: int) -> Counter[int]:
    counts: Counter[int] = Counter()
    for size, images in sizes.items():
        counts[size[side]] += images
    return counts


def _most_frequent(formats: Counter[str]) -> str:
    told = [f"{name} {count:,}" for name, count in formats.most_common(NAMED_FORMATS)]
    rest = sum(formats.values()) - sum(count for _, count in formats.most_common(NAMED_FORMATS))
    return ", ".join([*told, *([f"others {rest:,}"] if rest else [])]) or "-"

"""What reading a data set left aside, by stated rules, so that it can be told."""

import sys
from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any

from mmpeft.data.video import NUM_FRAMES


@dataclass
class Notes:
    """Counts of one or several data sets."""

    set_aside: Counter[str] = field(default_factory=Counter)
    """Bookkeeping keys that change no sample -> rows."""
    ignored: Counter[str] = field(default_factory=Counter)
    """Keys named in data.ignore -> rows."""
    mapped: Counter[str] = field(default_factory=Counter)
    """Columns of data.columns -> rows."""
    empty_answers: int = 0
    """Empty ones among several people's."""
    captioned: int = 0
    """Rows that list several captions."""
    captions: int = 0
    """How many these are together."""
    videos: int = 0
    """Videos whose rows do not say of how many frames."""
    of_files: dict[str, None] = field(default_factory=dict)
    """What is to be known of a file or folder, in whole sentences."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Why rows were left out -> how many."""
    first_skipped: dict[str, str] = field(default_factory=dict)
    """The same -> the first of them, with what is wrong with it."""

    def skip(self, reason: str, told: str, rows: int = 1) -> None:
        """Counts rows that are left out.

        Args:
            reason: why, in the same words for all of a kind.
            told: the first, with what is wrong with it.
        """
        self.skipped[reason] += rows
        self.first_skipped.setdefault(reason, told)

    def add(self, others: "Notes") -> None:
        """Counts what another reading left aside."""
        self.set_aside.update(others.set_aside)
        self.ignored.update(others.ignored)
        self.mapped.update(others.mapped)
        self.empty_answers += others.empty_answers
        self.captioned += others.captioned
        self.captions += others.captions
        self.videos += others.videos
        self.of_files.update(others.of_files)
        for reason, rows in others.skipped.items():
            self.skip(reason, others.first_skipped[reason], rows)

    @property
    def told(self) -> dict[str, Any]:
        """As JSON holds it; `Notes.read` reads it."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @classmethod
    def read(cls, told: dict[str, Any]) -> "Notes":
        """Of `told`."""
        counters = {each.name for each in fields(cls) if each.default_factory is Counter}
        values: dict[str, Any] = {n: Counter(own) if n in counters else own for n, own in told.items()}
        return cls(**values)

    def tell(self, what: str) -> None:
        """Prints `lines` for people; ``what`` names the data."""
        for line in self.lines():
            print(f"{what}: {line}", file=sys.stderr)

    def lines(self) -> list[str]:
        """What is to be told, a line each."""
        told = [
            f"{what}: {', '.join(f'{key} ({count:,})' for key, count in counts.most_common())}"
            for what, counts in (
                ("keys that change no sample, set aside", self.set_aside),
                ("keys left out by data.ignore", self.ignored),
            )
            if counts
        ]
        if self.empty_answers:
            told.append(f"{self.empty_answers:,} empty answers among several people's, left out")
        if self.captioned:
            told.append(
                f"{self.captioned:,} rows list {self.captions:,} captions: training learns each of them, a test asks "
                "once and takes all as references"
            )
        if self.videos:
            told.append(f"{self.videos:,} videos whose rows do not say frames: {NUM_FRAMES} of each")
        return [*told, *self.of_files, *self.skipped_lines]

    @property
    def skipped_lines(self) -> list[str]:
        """What of it is about rows that were left out."""
        return [
            f"{rows:,} bad rows skipped (data.on_bad_sample): {reason}, the first: {self.first_skipped[reason]}"
            for reason, rows in self.skipped.items()
        ]

    @property
    def skipped_by_reason(self) -> str:
        """How many rows were left out, in a line."""
        by_reason = ", ".join(f"{rows:,} {reason}" for reason, rows in self.skipped.items())
        return f"{self.skipped.total():,} bad rows: {by_reason}"

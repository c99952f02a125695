"""What reading a data set left aside, by stated rules, so that it can be told."""

from collections import Counter
from dataclasses import dataclass, field


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
    skipped: list[str] = field(default_factory=list)
    """Rows that were left out, each with its reason."""

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
        if self.skipped:
            told.append(
                f"{len(self.skipped):,} bad rows skipped (data.on_bad_sample), the first: {self.skipped[0]}"
            )
        return told

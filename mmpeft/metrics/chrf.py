"""chrF: how many runs of characters two texts share. It needs no words, so it suits every language.

Source: Popović 2015, with the F of each length averaged, as in Popović's chrF++.py and in torchmetrics (sacreBLEU
averages precision and recall instead). torchmetrics' own (1.9) is not used: a row that shares nothing with its
references, an empty answer above all, is left out of its recall, so that ["abcdef", ""] has a chrF of 1; and it takes
39 s for 1,000 captions with five references each, where this takes under a second.
"""

from collections import Counter
from collections.abc import Sequence

LONGEST = 6
"""Runs of 1 to 6 characters; spaces are not looked at."""
BETA = 2.0
"""Recall counts so many times as much as precision."""


def chrf(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """chrF2 of the whole set, 0..1; case and punctuation count.

    Of several references the one with the highest F counts (of equal ones the first), also where it shares
    nothing: torchmetrics leaves that reference out of the recall.
    """
    total = [[0, 0, 0] for _ in range(LONGEST)]
    for prediction, texts in zip(predictions, references, strict=True):
        said = _count(prediction)
        best = max((_compare(said, _count(text)) for text in texts), key=_f_score)
        total = [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(total, best, strict=True)]
    return _f_score(total)


def _count(text: str) -> list[Counter[str]]:
    """Per length, how often each run of characters occurs."""
    text = text.strip().replace(" ", "")
    return [
        Counter(text[start : start + n] for start in range(len(text) - n + 1)) for n in range(1, LONGEST + 1)
    ]


def _compare(said: list[Counter[str]], reference: list[Counter[str]]) -> list[list[int]]:
    """Per length: runs shared, runs said, runs of the reference."""
    return [
        [(mine & theirs).total(), mine.total(), theirs.total()]
        for mine, theirs in zip(said, reference, strict=True)
    ]


def _f_score(counts: list[list[int]]) -> float:
    """The mean of F over the lengths. F = (1 + b²) shared / (said + b² reference)."""
    weight = BETA**2
    scores = [
        (1 + weight) * shared / (said + weight * true) if shared else 0.0 for shared, said, true in counts
    ]
    return sum(scores) / LONGEST

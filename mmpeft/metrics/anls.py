"""ANLS: how nearly an answer is spelt as one of the right ones, for text read in images.

Source: Biten et al. 2019, the ICDAR 2019 challenge on scene text VQA, also of DocVQA: of each answer
1 - Levenshtein distance / length of the longer text, the best over the references, and 0 for a distance that is half
of that length or more. Case and runs of white space do not count. At exactly half the published definition gives 0,
and so do we; some evaluation code gives 0.5 there.
"""

from collections.abc import Sequence

THRESHOLD = 0.5
"""A share of different characters from which on an answer is no misspelling but wrong."""


def anls_score(prediction: str, references: Sequence[str]) -> float:
    """How near the answer is to the nearest reference, 0..1."""
    said = _plain(prediction)
    return max(_similarity(said, _plain(reference)) for reference in references)


def levenshtein(first: str, second: str) -> int:
    """The fewest characters to insert, delete or replace that make one text of the other."""
    distances = list(range(len(second) + 1))  # from the empty beginning of the first
    for row, char in enumerate(first, start=1):
        left, distances[0] = distances[0], row
        for column, other in enumerate(second, start=1):
            kept = left + (char != other)
            left, distances[column] = (
                distances[column],
                min(kept, distances[column] + 1, distances[column - 1] + 1),
            )
    return distances[-1]


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _similarity(said: str, true: str) -> float:
    longest = max(len(said), len(true))
    if not longest:
        return 1.0
    share = levenshtein(said, true) / longest
    return 1 - share if share < THRESHOLD else 0.0

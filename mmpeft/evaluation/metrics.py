"""How an answer is scored."""

from collections.abc import Iterable


def exact_match(prediction: str, truth: str) -> bool:
    """Whether the two are equal once the white space around them is trimmed.

    Strict on purpose: case, punctuation and wording count, so "Blue", "blue." and "light blue" are all wrong
    for "blue". It needs no list of synonyms and flatters nobody; for free text it is too hard.
    """
    return prediction.strip() == truth.strip()


def accuracy(pairs: Iterable[tuple[str, str]]) -> float:
    """The share, 0..1, of (prediction, truth) pairs that match exactly.

    Raises:
        ValueError: there are no pairs.
    """
    matches = [exact_match(prediction, truth) for prediction, truth in pairs]
    if not matches:
        raise ValueError("accuracy of no answers; wanted at least one (prediction, truth) pair")
    return sum(matches) / len(matches)

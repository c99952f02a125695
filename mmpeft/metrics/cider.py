"""CIDEr-D: how much a caption says what people say of the image, words that all captions share counting little.

Source: Vedantam et al. 2015: tf-idf and cosine of CIDEr, clipping and gaussian of CIDEr-D. The numbers are those of
the COCO caption evaluation but for its tokenizer.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from mmpeft.errors import RefusedError
from mmpeft.metrics.words import words

LONGEST = 4
"""n-grams of 1 to 4 words."""
SIGMA = 6.0
"""Of the gaussian over the difference in length, in words."""
Gram = tuple[str, ...]


@dataclass
class _Text:
    """A text as LONGEST vectors of tf-idf weights, one per length of n-gram."""

    num_words: int
    weights: list[dict[Gram, float]]
    norms: list[float]


def cider_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of every row, 0..10. The scores of a row depend on the references of all rows.

    An n-gram weighs log(rows / rows with a reference that has it), so what every row has weighs nothing.

    Raises:
        RefusedError: there are fewer than two rows: every weight would be 0. See `weighs_nothing`.
    """
    if len(references) < 2:
        raise RefusedError(weighs_nothing(references))
    counted = [[_count(text) for text in texts] for texts in references]
    rows_with = Counter(gram for texts in counted for gram in set().union(*texts))
    weight = {gram: math.log(len(counted) / rows) for gram, rows in rows_with.items()}
    unseen = math.log(len(counted))
    scores = []
    for prediction, texts in zip(predictions, counted, strict=True):
        said = _weigh(_count(prediction), weight, unseen)
        scores.append(10 * fmean(_similarity(said, _weigh(text, weight, unseen)) for text in texts))
    return scores


def cider(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The mean of `cider_scores`."""
    return fmean(cider_scores(predictions, references))


def weighs_nothing(references: Sequence[Sequence[str]]) -> str | None:
    """Why every n-gram of the references weighs 0, in words, so that no prediction can score; None if one does not."""
    if len(references) < 2:
        return f"found {len(references)} row(s); CIDEr weighs words by how many rows have them and wants at least 2"
    grams = ({gram for text in texts for gram in _count(text)} for texts in references)
    first = next(grams)
    if all(first == others for others in grams):
        return (
            f"the references of all {len(references)} rows say the same, such as {references[0][0]!r:.80}; CIDEr "
            "weighs words by how many rows have them, gives what every row has no weight, and would be 0"
        )
    return None


def _count(text: str) -> Counter[Gram]:
    """Every n-gram of 1 to LONGEST words, with how often it stands there."""
    tokens = words(text)
    return Counter(
        tuple(tokens[start : start + n])
        for n in range(1, LONGEST + 1)
        for start in range(len(tokens) - n + 1)
    )


def _weigh(counts: Counter[Gram], weight: Mapping[Gram, float], unseen: float) -> _Text:
    vectors: list[dict[Gram, float]] = [{} for _ in range(LONGEST)]
    for gram, count in counts.items():
        vectors[len(gram) - 1][gram] = count * weight.get(gram, unseen)
    norms = [math.hypot(*vector.values()) for vector in vectors]
    return _Text(sum(count for gram, count in counts.items() if len(gram) == 1), vectors, norms)


def _similarity(said: _Text, reference: _Text) -> float:
    """The mean over n of the clipped cosine, less for texts of different length, 0..1."""
    pairs = zip(said.weights, reference.weights, said.norms, reference.norms, strict=True)
    cosines = []
    for mine, theirs, my_norm, their_norm in pairs:
        shared = sum(
            min(value, theirs[gram]) * theirs[gram] for gram, value in mine.items() if gram in theirs
        )
        cosines.append(shared / (my_norm * their_norm) if shared else 0.0)
    distance = said.num_words - reference.num_words
    return fmean(cosines) * math.exp(-(distance**2) / (2 * SIGMA**2))

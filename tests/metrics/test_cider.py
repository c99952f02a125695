"""CIDEr-D against published numbers and a second, slow implementation of the formula."""

import math
import random

import numpy as np
import pytest

from mmpeft.metrics.cider import cider, cider_scores
from mmpeft.metrics.words import words

VOCABULARY = [
    "a",
    "man",
    "is",
    "speaking",
    "while",
    "the",
    "bird",
    "sits",
    "on",
    "red",
    "table",
    "in",
    "front",
    "of",
]


def slow_cider_d(predictions, references):
    """CIDEr-D of Vedantam et al. 2015 with dense vectors over all n-grams of the set."""

    def grams(text, n):
        tokens = words(text)
        return [" ".join(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]

    scores = np.zeros(len(predictions))
    for n in (1, 2, 3, 4):
        texts = [*predictions, *(text for texts in references for text in texts)]
        every = sorted({gram for text in texts for gram in grams(text, n)})
        document = [{gram for text in texts for gram in grams(text, n)} for texts in references]
        rows_with = np.array([max(1, sum(gram in found for found in document)) for gram in every])
        idf = np.log(len(references) / rows_with)

        def vector(text, n=n, every=every, idf=idf):
            return np.array([grams(text, n).count(gram) for gram in every]) * idf

        for row, (prediction, texts) in enumerate(zip(predictions, references, strict=True)):
            for text in texts:
                said, true = vector(prediction), vector(text)
                norm = np.linalg.norm(said) * np.linalg.norm(true)
                cosine = np.minimum(said, true) @ true / norm if norm else 0.0
                distance = len(words(prediction)) - len(words(text))
                scores[row] += 10 / 4 / len(texts) * cosine * math.exp(-(distance**2) / 72)
    return scores


def test_published_numbers():
    """From the documentation of aac-metrics, checked there against the COCO caption evaluation."""
    predictions = ["a man is speaking", "rain falls"]
    long = "a man is speaking while a bird is chirping in the background"
    references = [["a man speaks.", "someone speaks.", long], ["rain is falling hard on a surface"]]
    assert cider_scores(predictions, references) == pytest.approx([1.3641, 0.5587], abs=5e-5)
    assert cider(predictions, references) == pytest.approx(0.9614, abs=5e-5)


@pytest.mark.parametrize("seed", range(3))
def test_the_formula(seed):
    generator = random.Random(seed)
    texts = [" ".join(generator.choices(VOCABULARY, k=generator.randint(0, 12))) for _ in range(40)]
    predictions, rest = [*texts[:7], "unseen words only"], texts[7:]
    references = [rest[4 * row : 4 * row + generator.randint(1, 4)] for row in range(8)]
    wanted = slow_cider_d(predictions, references)
    assert cider_scores(predictions, references) == pytest.approx(wanted.tolist(), abs=1e-9)
    assert wanted.max() > 0.5


def test_what_is_certain():
    same = ["a man is speaking loudly", "the bird sits on red tables"]
    assert cider_scores(same, [[text] for text in same]) == pytest.approx([10, 10])
    assert cider_scores(["", "nothing else"], [[text] for text in same]) == [0, 0]
    assert cider_scores(["a"] * 2, [["a"], ["a"]]) == [0, 0]  # what every row has weighs nothing


def test_repeating_a_word_does_not_pay():
    references = [["a red bird sits here"], ["one man speaks"]]
    once, often = (cider_scores([text, "x"], references)[0] for text in ("bird", "bird bird bird bird bird"))
    assert often < once


def test_one_row_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        cider(["a cat"], [["a cat"]])

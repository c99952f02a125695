"""BLEU, chrF and ROUGE: how much two texts share. It is the only module that uses `sacrebleu` and `torchmetrics`."""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from mmpeft.metrics.sums import Numbers, Sums
from mmpeft.metrics.words import words


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU-4 of the whole set, 0..1, by sacrebleu's defaults: 13a tokenisation, case counts, exp smoothing.

    Source: Papineni et al. 2002; Post 2018. Any reference may give the n-grams; the one nearest in length gives the
    brevity penalty.
    """
    from sacrebleu import corpus_bleu

    return _share(corpus_bleu(predictions, _streams(references)).score)


def chrf(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """chrF2 of the whole set, 0..1, by sacrebleu's defaults: runs of 1 to 6 characters, case counts, spaces do not.

    Source: Popović 2015. It needs no words, so it suits every language. Of several references the one with the
    highest F counts.
    """
    from sacrebleu import corpus_chrf

    return _share(corpus_chrf(predictions, _streams(references)).score)


def bleu_sums(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Sums:
    """`bleu` as a function of the counts of n-grams and words of the rows."""
    from sacrebleu.metrics import BLEU

    return _sums(BLEU(), predictions, references)


def chrf_sums(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Sums:
    """`chrf` as a function of the counts of runs of characters of the rows."""
    from sacrebleu.metrics import CHRF

    return _sums(CHRF(), predictions, references)


def _sums(metric: Any, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Sums:
    """By what sacrebleu's own bootstrap is made of (2.6), which draws rows and knows no clusters."""
    import numpy as np

    rows = np.array(metric._extract_corpus_statistics(predictions, _streams(references)), float)

    def values(sums: Numbers) -> dict[str, Numbers]:
        return {"": np.array([_share(metric._compute_score_from_stats(own.tolist()).score) for own in sums])}

    return Sums(rows, values)


def rouge_scores(predictions: Sequence[str], references: Sequence[Sequence[str]], kind: str) -> list[float]:
    """`rouge` of every row."""
    return [rouge([said], [texts], kind) for said, texts in zip(predictions, references, strict=True)]


def rouge(predictions: Sequence[str], references: Sequence[Sequence[str]], kind: str) -> float:
    """ROUGE-N or ROUGE-L, 0..1: the mean over rows of the F1 with the reference that it is highest for.

    Source: Lin 2004. Needs neither `nltk` nor its data: both serve ROUGE-Lsum and stemming alone.

    Args:
        kind: "rouge1", "rouge2" or "rougeL".
    """
    from torchmetrics.functional.text import rouge_score  # brings torch, which the other metrics do without

    scores = rouge_score(
        predictions, references, normalizer=str, tokenizer=words, rouge_keys=kind, accumulate="best"
    )
    return scores[f"{kind}_fmeasure"].item()


def _streams(references: Sequence[Sequence[str]]) -> list[list[Any]]:
    """Every row's first reference, every row's second and so on; None where a row has no more.

    Sorted, because chrF takes the first of equally good references, also where their lengths differ.
    """
    return [list(stream) for stream in zip_longest(*map(sorted, references))]


def _share(percent: float) -> float:
    return min(percent / 100, 1.0)  # a perfect BLEU is 100.00000000000004

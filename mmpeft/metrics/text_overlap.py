"""BLEU and ROUGE: how many words two texts share. It is the only module that uses `torchmetrics`."""

from collections.abc import Sequence

from mmpeft.metrics.words import words


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU-4 of the whole set, 0..1, over words and without smoothing.

    Source: Papineni et al. 2002. Any reference may give the n-grams; the one nearest in length gives the brevity
    penalty.
    """
    from torchmetrics.functional.text import bleu_score  # brings torch, which the other metrics do without

    spaced = [[" ".join(words(text)) for text in texts] for texts in references]
    return bleu_score([" ".join(words(text)) for text in predictions], spaced).item()


def rouge(predictions: Sequence[str], references: Sequence[Sequence[str]], kind: str) -> float:
    """ROUGE-N or ROUGE-L, 0..1: the mean over rows of the F1 with the reference that it is highest for.

    Source: Lin 2004. Needs neither `nltk` nor its data: both serve ROUGE-Lsum and stemming alone.

    Args:
        kind: "rouge1", "rouge2" or "rougeL".
    """
    from torchmetrics.functional.text import rouge_score

    scores = rouge_score(
        predictions, references, normalizer=str, tokenizer=words, rouge_keys=kind, accumulate="best"
    )
    return scores[f"{kind}_fmeasure"].item()

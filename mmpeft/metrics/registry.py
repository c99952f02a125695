"""How answers are scored: every metric by name, and which of them fit the data."""

import difflib
import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

from mmpeft.errors import RefusedError
from mmpeft.metrics import calibration, classification
from mmpeft.metrics import text_overlap as overlap
from mmpeft.metrics.anls import anls_score
from mmpeft.metrics.answer import Answer as Answer
from mmpeft.metrics.cider import cider, cider_scores, weighs_nothing
from mmpeft.metrics.sums import Numbers, Sums, mean_of
from mmpeft.metrics.vqa import vqa_score
from mmpeft.metrics.words import words

MAX_LABELS = 30
"""More different answers are not taken for classes."""
SHORT = 3
"""Words: an answer of so many is a label or a fact, a longer one is a text."""
PEOPLE = 5
"""So many answers of a row are people's votes (ten in VQA v2); fewer are all right, as in DocVQA."""


def exact_match(prediction: str, truth: str) -> bool:
    """Whether the two are equal once the white space around them is trimmed.

    Strict on purpose: case, punctuation and wording count, so "Blue", "blue." and "light blue" are all wrong
    for "blue". It needs no list of synonyms and flatters nobody; for free text it is too hard.
    """
    return prediction.strip() == truth.strip()


@dataclass(frozen=True)
class Metric:
    """A way to score a set of answers, and what it needs of them."""

    compute: Callable[[Sequence[Answer]], float | Mapping[str, float]]
    """One value, or several by name (a label, "macro")."""
    fits: Callable[[Sequence[Answer]], bool]
    """Whether it is worth telling for these answers, none of which lacks anything."""
    lacks: Callable[[Answer], str | None] = lambda answer: None
    """What a row lacks for it, in words; None if nothing."""
    lack_together: Callable[[Sequence[Answer]], str | None] = lambda answers: None
    """What all rows lack for it together, in words; None if nothing. It reads no prediction."""
    scores: Callable[[Sequence[Answer]], Sequence[float]] | None = None
    """Of every row, where the metric is their mean."""
    sums: Callable[[Sequence[Answer]], Sums] | None = None
    """The metric as a function of sums, where it is no mean of scores."""
    most: float = 1.0
    """What a score is at most, from 0 on."""

    def sums_of(self, answers: Sequence[Answer]) -> Sums:
        """The metric of these answers as a function of sums over them."""
        if self.scores is not None:
            return mean_of(self.scores(answers), are_shares=self.most == 1)
        assert self.sums is not None, "a metric is a mean of scores or a function of sums"
        return self.sums(answers)


def evaluate(answers: Sequence[Answer], names: Sequence[str] | None = None) -> dict[str, float]:
    """Name -> value; a metric of several values has a name for each, as "f1/macro" and "f1/red".

    Args:
        names: keys of `METRICS`, or single values of them such as "f1/macro"; default: `fitting_metrics`.

    Raises:
        RefusedError: there are no answers, a name is unknown, or a row lacks what a metric needs.
    """
    if not answers:
        raise RefusedError("there are no answers to evaluate; wanted at least one")
    if names is None:
        names = fitting_metrics(answers)
        for name, metric in METRICS.items():
            if (missing := metric.lack_together(answers)) and metric.fits(answers):
                print(f"{name} is left out: {missing}", file=sys.stderr)
    else:
        check_metrics(names, answers)
    results: dict[str, float] = {}
    for name in names:
        family = name.partition("/")[0]
        values = _compute(family, answers)
        if name != family and name not in values:
            raise RefusedError(f"{family} has no value {name!r}; closest: {_closest(name, values)}")
        results |= values if name == family else {name: values[name]}
    return results


def check_metrics(names: Sequence[str], answers: Sequence[Answer]) -> None:
    """Raises:
    RefusedError: no metric has this name, or a row or all together lack what it needs. No prediction is looked at.
    """
    for name in names:
        family = name.partition("/")[0]
        if family not in METRICS:
            raise RefusedError(f"no metric is called {name!r}; closest: {_closest(name, METRICS)}")
        for answer in answers:
            if missing := METRICS[family].lacks(answer):
                raise RefusedError(f"{family} does not fit {answer.row}: {missing}; or leave {family} out")
        if answers and (missing := METRICS[family].lack_together(answers)):
            raise RefusedError(f"{family} does not fit the data: {missing}; leave {family} out")


def fitting_metrics(answers: Sequence[Answer]) -> list[str]:
    """The keys of `METRICS` that tell something about these answers, in its order.

    - exact_match: always.
    - accuracy: every row has choices, or the answers are classes.
    - precision, recall, f1: the answers are classes: 2 to 30 labels (first references and choices), and either
      every row has choices, or every first reference has at most 3 words and occurs at least twice.
    - vqa_accuracy: every row has several references, most have at least 5, and half of the first ones or more have at
      most 3 words.
    - anls: the same, but some row has several references and most have at most 4.
    - bleu, rouge1, rouge2, rougeL, chrf, cider: most first references have more than 3 words; of captions rouge and
      cider also where they are shorter. cider is left out, aloud, where its formula can only give 0.
    - perplexity: every row has a log-likelihood.
    - calibration_error, brier: every row has choices with scores, its truth among them.
    """
    return [
        name
        for name, metric in METRICS.items()
        if all(metric.lacks(answer) is None for answer in answers)
        and metric.lack_together(answers) is None
        and metric.fits(answers)
    ]


def of_one_class(name: str) -> bool:
    """Whether a value is that of a class alone, as "f1/red" is."""
    family, _, label = name.partition("/")
    return family in METRICS and label not in ("", classification.MACRO)


def _compute(name: str, answers: Sequence[Answer]) -> dict[str, float]:
    value = METRICS[name].compute(answers)
    if isinstance(value, Mapping):
        return {f"{name}/{part}": share for part, share in value.items()}
    return {name: value}


def _closest(name: str, names: Mapping[str, object]) -> list[str]:
    return difflib.get_close_matches(name, names, n=3, cutoff=0.0)


# What the metrics share: the mean over rows, texts as lists, and what kind of answers there are.


def _each(score: Callable[[Answer], float]) -> Callable[[Sequence[Answer]], list[float]]:
    return lambda answers: [*map(score, answers)]


def _mean(score: Callable[[Answer], float], *fits: Callable[..., Any]) -> Metric:
    """The metric that is the mean of a score of each row; ``fits`` are `Metric.fits` and `Metric.lacks`."""
    return Metric(lambda answers: sum(map(score, answers)) / len(answers), *fits, scores=_each(score))


def _texts(score: Callable[..., Any]) -> Callable[[Sequence[Answer]], Any]:
    """A score of predictions and lists of references as one of answers."""
    return lambda answers: score([a.prediction for a in answers], [a.references for a in answers])


def _always(answers: Sequence[Answer]) -> bool:
    return True


def _have_choices(answers: Sequence[Answer]) -> bool:
    return all(answer.choices for answer in answers)


def _are_classes(answers: Sequence[Answer]) -> bool:
    truths = Counter(answer.truth for answer in answers)
    labels = {choice.strip() for answer in answers for choice in answer.choices or ()} | truths.keys()
    if not 2 <= len(labels) <= MAX_LABELS:
        return False
    repeated = all(number > 1 and len(words(label)) <= SHORT for label, number in truths.items())
    return repeated or _have_choices(answers)


def _are_texts(answers: Sequence[Answer]) -> bool:
    return median(len(words(answer.truth)) for answer in answers) > SHORT


def _are_texts_or_captions(answers: Sequence[Answer]) -> bool:
    return _are_texts(answers) or all(answer.is_caption for answer in answers)


def _have_votes(answers: Sequence[Answer]) -> bool:
    return median(len(answer.references) for answer in answers) >= PEOPLE


def _fit_votes(answers: Sequence[Answer]) -> bool:
    return not _are_texts(answers) and _have_votes(answers)


def _fit_spellings(answers: Sequence[Answer]) -> bool:
    several = any(len(answer.references) > 1 for answer in answers)
    return several and not _are_texts(answers) and not _have_votes(answers)


# The metrics.


def _matches_any(answer: Answer) -> bool:
    return any(exact_match(answer.prediction, reference) for reference in answer.references)


def _perplexity(answers: Sequence[Answer]) -> float:
    """exp(-log-likelihood per token), over the tokens of all rows: a row weighs by its length."""
    likelihood = sum(answer.log_likelihood or 0.0 for answer in answers)
    mean = -likelihood / sum(answer.num_tokens or 0 for answer in answers)
    try:
        return math.exp(mean)
    except OverflowError:
        return math.inf


def _lacks_people(answer: Answer) -> str | None:
    found = len(answer.references)
    return (
        None if found > 1 else f"it has {found} reference; give the answers of several people under `answers`"
    )


def _lacks_likelihood(answer: Answer) -> str | None:
    return (
        None if answer.log_likelihood is not None else "it has no log_likelihood; compute it with the model"
    )


def _likelihoods(answers: Sequence[Answer]) -> Sums:
    """`_perplexity` as a function of the sums of log-likelihood and tokens."""
    import numpy as np

    rows = np.array([(answer.log_likelihood or 0.0, answer.num_tokens or 0) for answer in answers])

    def values(sums: Numbers) -> dict[str, Numbers]:
        with np.errstate(over="ignore"):
            return {"": np.exp(-sums[:, 0] / sums[:, 1])}

    return Sums(rows, values)


def _classes(name: str) -> Metric:
    return Metric(
        getattr(classification, name),
        _are_classes,
        sums=partial(classification.sums_by_label, name=name),
    )


def _rouge(kind: str) -> Metric:
    return Metric(
        _texts(partial(overlap.rouge, kind=kind)),
        _are_texts_or_captions,
        scores=_texts(partial(overlap.rouge_scores, kind=kind)),
    )


METRICS: dict[str, Metric] = {
    "exact_match": _mean(_matches_any, _always),
    "accuracy": Metric(
        classification.accuracy,
        lambda a: _have_choices(a) or _are_classes(a),
        scores=_each(classification.is_right),
    ),
    **{name: _classes(name) for name in classification.QUOTIENTS},
    "vqa_accuracy": _mean(lambda a: vqa_score(a.prediction, a.references), _fit_votes, _lacks_people),
    "anls": _mean(lambda a: anls_score(a.prediction, a.references), _fit_spellings),
    "bleu": Metric(_texts(overlap.bleu), _are_texts, sums=_texts(overlap.bleu_sums)),
    **{kind: _rouge(kind) for kind in ("rouge1", "rouge2", "rougeL")},
    "chrf": Metric(_texts(overlap.chrf), _are_texts, sums=_texts(overlap.chrf_sums)),
    "cider": Metric(
        _texts(cider),
        _are_texts_or_captions,
        lack_together=lambda answers: weighs_nothing([a.references for a in answers]),
        scores=_texts(cider_scores),
        most=10.0,
    ),
    "perplexity": Metric(_perplexity, _always, _lacks_likelihood, sums=_likelihoods),
    "calibration_error": Metric(
        calibration.calibration_error,
        *(_always, calibration.lacks_scores),
        sums=calibration.calibration_sums,
    ),
    "brier": Metric(
        calibration.brier,
        *(_always, calibration.lacks_scores),
        scores=_each(calibration.brier_score),
        most=2.0,
    ),
}
"""Name -> metric, in the order they are told."""

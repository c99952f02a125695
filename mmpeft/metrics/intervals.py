"""95 % intervals of metrics: the percentile bootstrap over clusters, questions about one image being drawn together.

Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13; clusters: Cameron, Gelbach and Miller
2008, section 3. Where all rows score 0, or all 1, no draw differs: there the bound is exact (Clopper and Pearson 1934),
a cluster counting as one trial; of a class those that it is about.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence

import numpy as np

from mmpeft.metrics.answer import Answer
from mmpeft.metrics.registry import METRICS
from mmpeft.metrics.sums import Numbers

DRAWS, SEED = 2000, 0
LOWEST, HIGHEST = 0.025, 0.975
AT_ONCE = 100
"""Draws whose weights are in memory together."""
Interval = tuple[float, float]


def intervals(
    answers: Sequence[Answer], clusters: Sequence[Hashable], values: Mapping[str, float]
) -> dict[str, Interval]:
    """Name -> (low, high) of its 95 % interval; none at all of fewer than two clusters.

    Args:
        answers: what was measured.
        clusters: of every answer, what it shares with those that it depends on, such as its image.
        values: what `evaluate` found of these answers.
    """
    families = list(dict.fromkeys(name.partition("/")[0] for name in values))
    found: dict[str, Interval] = {}
    parts = {family: METRICS[family].sums_of(answers) for family in families}
    if len(set(clusters)) < 2:
        return found
    drawn = draw(np.concatenate([own.rows for own in parts.values()], axis=1), clusters)
    first = 0
    for family, own in parts.items():
        last = first + own.rows.shape[1]
        alone = own.values(cluster_sums(own.rows, clusters)) if own.are_shares else {}
        for part, draws in own.values(drawn[:, first:last]).items():
            name = f"{family}/{part}" if part else family
            if name in values and not np.isnan(draws).all():
                found[name] = _interval(draws, alone.get(part))
        first = last
    return found


def by_images(images: Sequence[Sequence[str]]) -> list[Hashable]:
    """The clusters of questions: those about the same images are one, one about none stands for itself.

    Args:
        images: of every question.
    """
    return [tuple(own) or number for number, own in enumerate(images)]


def draw(rows: Numbers, clusters: Sequence[Hashable]) -> Numbers:
    """Sums over draws of as many clusters as there are, with replacement.

    Args:
        rows: (answers, numbers).
        clusters: of the answers.

    Returns:
        (DRAWS, numbers)
    """
    sums = cluster_sums(rows, clusters)
    generator, number = np.random.default_rng(SEED), len(sums)
    return np.concatenate([_weights(generator, number) @ sums for _ in range(DRAWS // AT_ONCE)])


def cluster_sums(rows: Numbers, clusters: Sequence[Hashable]) -> Numbers:
    """(clusters, numbers), in the order in which they come."""
    places = {cluster: place for place, cluster in enumerate(dict.fromkeys(clusters))}
    sums = np.zeros((len(places), rows.shape[1]))
    np.add.at(sums, [places[cluster] for cluster in clusters], rows)
    return sums


def percentiles(draws: Numbers) -> Interval:
    """Of draws (draws,), those left out that have no value."""
    # of a value that no draw is between, as of perplexities that overflow, nothing is interpolated
    low, high = np.nanquantile(draws, [LOWEST, HIGHEST], method="nearest")
    return float(low), float(high)


def told(interval: Interval | None) -> str:
    """As it stands behind a value; nothing where there is none."""
    return "" if interval is None else f" ({interval[0]:.4f} to {interval[1]:.4f})"


LOW, HIGH = "ci95_low", "ci95_high"


def as_metrics(found: Mapping[str, Interval]) -> Iterator[tuple[str, float]]:
    """Intervals among the numbers of metrics.json: ``ci95_low/NAME`` and ``ci95_high/NAME``."""
    for name, (low, high) in found.items():
        yield f"{LOW}/{name}", low
        yield f"{HIGH}/{name}", high


def of_metric(metrics: Mapping[str, float], name: str) -> Interval | None:
    """The interval of a name among such numbers."""
    low, high = metrics.get(f"{LOW}/{name}"), metrics.get(f"{HIGH}/{name}")
    return None if low is None or high is None else (low, high)


def is_bound(name: str) -> bool:
    """Whether a number among those of metrics.json is an end of an interval."""
    return name.partition("/")[0] in (LOW, HIGH)


def readable(metrics: Mapping[str, float]) -> dict[str, str]:
    """Name -> value with its interval, of the numbers of metrics.json."""
    return {
        name: f"{round(value, 4)}{told(of_metric(metrics, name))}"
        for name, value in metrics.items()
        if not is_bound(name)
    }


def _weights(generator: np.random.Generator, clusters: int) -> Numbers:
    """(AT_ONCE, clusters) how often each is drawn."""
    return generator.multinomial(clusters, np.full(clusters, 1 / clusters), AT_ONCE).astype(float)


def _interval(draws: Numbers, alone: "Numbers | None") -> Interval:
    """``alone`` is of a share what every cluster has by itself, nan of those that say nothing of it."""
    low, high = percentiles(draws)
    if alone is not None and low == high in (0.0, 1.0):
        beyond = LOWEST ** (1 / int((alone == high).sum()))
        return (0.0, 1 - beyond) if high == 0 else (beyond, 1.0)
    return low, high

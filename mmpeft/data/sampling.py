"""Which examples are seen how often: few-shot subsets, and mixing data files by weight."""

import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from mmpeft.data.formats import DataError
from mmpeft.errors import RefusedError


def mixed_order(sizes: Sequence[int], weights: Sequence[float], rng: random.Random) -> list[int]:
    """One epoch over files of ``sizes`` examples, as many examples as they hold together, shared out by ``weights``.

    A file with more than its size is gone through several times, and one with less is sampled; no example is seen
    a second time before its whole file has been seen.

    Returns:
        Numbers of examples, counted through all files.

    Raises:
        RefusedError: a file is empty, or its share of the epoch is not even one example.
    """
    order: list[int] = []
    first = 0
    for number, (size, count) in enumerate(zip(sizes, _shares(sum(sizes), weights), strict=True), start=1):
        if not size or not count:
            raise RefusedError(
                f"file {number} of {len(sizes)} has {size} examples and a share of {count} in an epoch of "
                f"{sum(sizes)}; each needs at least one: change data.weights"
            )
        while count > 0:
            order += [first + number for number in rng.sample(range(size), min(size, count))]
            count -= size
        first += size
    return rng.sample(order, len(order))


def _shares(total: int, weights: Sequence[float]) -> list[int]:
    """``total`` in whole parts by weight."""
    ends = [round(total * sum(weights[: n + 1]) / sum(weights)) for n in range(len(weights))]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def sample_shots(records: Sequence[Any], shots: int, seed: int) -> list[Any]:
    """``shots`` examples of every answer, in the order of the records.

    The classes are the choices of the rows; where rows have none, the answers that occur.

    Raises:
        DataError: a class has fewer examples; the message names a row that lists it.
    """
    by_class: dict[str, list[int]] = defaultdict(list)
    listed: dict[str, str] = {}
    for number, record in enumerate(records):
        answer = record["turns"][-1][1].strip()
        by_class[answer].append(number)
        for choice in record.get("choices", [answer]):
            listed.setdefault(choice.strip(), f"{record['where']} (id {record['id']!r})")
    rng, chosen = random.Random(f"few-shot {seed}"), []
    for name in sorted(listed):
        if len(by_class[name]) < shots:
            raise DataError(
                f"{len(by_class[name])} examples have the answer {name!r}, which {listed[name]} lists; wanted "
                f"{shots} of every class: lower data.shots or add examples"
            )
        chosen += rng.sample(by_class[name], shots)
    return [records[number] for number in sorted(chosen)]

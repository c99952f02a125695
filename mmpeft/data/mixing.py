"""How often examples of several data files are seen."""

import random
from collections.abc import Sequence


def mixed_order(sizes: Sequence[int], weights: Sequence[float], rng: random.Random) -> list[int]:
    """One epoch over files of ``sizes`` examples, as many examples as they hold together, shared out by ``weights``.

    A file with more than its size is gone through several times, and one with less is sampled; no example is seen
    a second time before its whole file has been seen.

    Returns:
        Numbers of examples, counted through all files.

    Raises:
        ValueError: a file is empty, or its share of the epoch is not even one example.
    """
    order: list[int] = []
    first = 0
    for number, (size, count) in enumerate(zip(sizes, _shares(sum(sizes), weights), strict=True), start=1):
        if not size or not count:
            raise ValueError(
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

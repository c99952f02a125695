"""Few-shot training sets: so many examples of every class."""

import random
from collections import defaultdict
from typing import Any

from mmpeft.data.sources import DataError


def sample_shots(records: list[Any], shots: int, seed: int) -> list[Any]:
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

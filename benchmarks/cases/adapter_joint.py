"""A step of 8 T-Few finetunes of 2 rows each, in one pass and one after the other, for rows of several lengths.

The frozen base's ratio says how much of it is the processor, which multiplies few tokens less well than many.
"""

from collections.abc import Iterator

from benchmarks.models import METHODS, bank_of, base, embeds_of, names, one_after_the_other, step
from benchmarks.race import Race

FINETUNES, ROWS, LENGTHS = 8, 2, (16, 32, 64, 128)


def adapter_joint() -> Iterator[Race]:
    """A race for each length."""
    bank, alone, frozen = bank_of(METHODS["IA3"][0], FINETUNES), bank_of(METHODS["IA3"][0]), base()
    bank.route([name for name in names(FINETUNES) for _ in range(ROWS)])
    alone.route(names(1) * ROWS)
    for length in LENGTHS:
        embeds = embeds_of(FINETUNES * ROWS, length, frozen)
        parts = embeds.split(ROWS)
        runs = {
            "one pass": step(bank.model, embeds, bank),
            "one after the other": one_after_the_other([step(alone.model, part, alone) for part in parts]),
            "frozen base, one pass": step(frozen, embeds),
            "frozen base, one after the other": one_after_the_other([step(frozen, part) for part in parts]),
        }
        yield Race(f"8 T-Few finetunes, rows of {length} tokens", runs, ("one after the other",))

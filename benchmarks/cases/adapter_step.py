"""What adapters add to a training step of 4 x 128 tokens: ours and peft's beside the frozen base."""

from collections.abc import Iterator

from benchmarks.models import METHODS, bank_of, base, embeds_of, names, peft_of, step
from benchmarks.race import Race, Run

ROWS, LENGTH = 4, 128


def adapter_step() -> Iterator[Race]:
    """Forward and backward; the frozen base gives a gradient to its inputs alone."""
    frozen = base()
    embeds = embeds_of(ROWS, LENGTH, frozen)
    runs: dict[str, Run] = {"frozen base": step(frozen, embeds)}
    for name, (own, theirs) in METHODS.items():
        bank = bank_of(own)
        bank.route(names(1) * ROWS)
        runs |= {
            f"mmpeft {name}": step(bank.model, embeds, bank),
            f"peft {name}": step(peft_of(theirs), embeds),
        }
    yield Race("training step", runs, ("frozen base",), repeats=7)

"""A forward of 32 rows x 32 tokens over 1, 8 and 32 finetunes mixed: ours and peft's beside the frozen base."""

from collections.abc import Iterator

import torch

from benchmarks.models import METHODS, VOCABULARY, bank_of, base, forward, names, peft_of
from benchmarks.race import Race, Run

ROWS, LENGTH, COUNTS = 32, 32, (1, 8, 32)


def adapter_forward() -> Iterator[Race]:
    """peft mixes LoRA alone."""
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH))
    rows = {count: [names(count)[row % count] for row in range(ROWS)] for count in COUNTS}
    runs: dict[str, Run] = {"frozen base": forward(base(), ids)}
    for method in ("LoRA q,v", "IA3"):
        bank = bank_of(METHODS[method][0], max(COUNTS))
        for count in COUNTS:
            route = lambda bank=bank, count=count: bank.route(rows[count])  # noqa: E731
            runs[f"mmpeft {method}, {count} finetunes"] = forward(bank.model, ids, route)
    theirs = peft_of(METHODS["LoRA q,v"][1], max(COUNTS)).eval()
    for count in COUNTS:
        runs[f"peft LoRA q,v, {count} finetunes"] = forward(theirs, ids, adapter_names=rows[count])
    yield Race("mixed batch", runs, ("frozen base",), repeats=15)

"""A thousand T-Few finetunes beside one base: what they weigh, how long one takes to load, what their number costs."""

import tempfile
from collections.abc import Iterator

import torch

from benchmarks.models import METHODS, VOCABULARY, bank_of, base, forward
from benchmarks.race import Race
from mmpeft.adapters.peft_format import load_adapter, save_adapter

ROWS, LENGTH = 32, 32
STAGES = (1, 10, 100, 1000)


def hot_bank() -> Iterator[Race]:
    """Loading, replacing and serving as the bank fills."""
    model = base()
    base_mb = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH))
    bank = bank_of(METHODS["IA3"][0], 0, model)
    bank.reserve("ia3", max(STAGES))
    bank.add("finetune0", METHODS["IA3"][0])
    with tempfile.TemporaryDirectory() as directory:
        save_adapter(bank, "finetune0", directory, "embedded")
        for stage in STAGES:
            for number in range(len(bank.names), stage):
                load_adapter(bank, f"finetune{number}", directory)
            asked = [f"finetune{row * max(1, stage // ROWS) % stage}" for row in range(ROWS)]
            runs = {
                "loading one in the place of another": lambda: load_adapter(
                    bank, "finetune0", directory, replace=True
                ),
                "a batch of 32 rows": forward(bank.model, ids, lambda asked=asked: bank.route(asked)),
            }
            weight = 4 * sum(p[0].numel() for p in bank.parameters()) / 1e6
            facts = {"finetunes_mb": round(stage * weight, 1), "base_mb": round(base_mb, 1)}
            title = f"{stage} finetunes of {stage * weight:.1f} MB beside {base_mb:.1f} MB"
            yield Race(title, runs, repeats=7, facts=facts)

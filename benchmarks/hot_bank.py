"""A thousand T-Few finetunes beside one base: what they weigh, how long one takes to load, what their number costs.

One JSON line per number of finetunes.

    python benchmarks/hot_bank.py
"""

import tempfile

import torch
from jsonargparse import auto_cli
from timing import alternate, report

from mmpeft.adapters import AdapterBank, IA3Config
from mmpeft.adapters.peft_format import load_adapter, save_adapter
from mmpeft.models.language import LanguageConfig, load_language_model

ROWS, LENGTH = 32, 32
STAGES = (1, 10, 100, 1000)


def hot_bank(repeats: int = 7) -> None:
    """Times loading, replacing and serving as the bank fills.

    Args:
        repeats: rounds over what is timed.
    """
    torch.manual_seed(0)
    model = load_language_model(LanguageConfig())
    base_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    bank = AdapterBank(model)
    bank.reserve("ia3", max(STAGES))
    ids = torch.randint(1000, (ROWS, LENGTH))
    with tempfile.TemporaryDirectory() as directory:
        bank.add("finetune0", IA3Config())
        save_adapter(bank, "finetune0", directory, "embedded")
        for stage in STAGES:
            for number in range(len(bank.names), stage):
                load_adapter(bank, f"finetune{number}", directory)

            def replace() -> None:
                load_adapter(bank, "finetune0", directory, replace=True)

            def serve(stage: int = stage) -> None:
                bank.route([f"finetune{row * max(1, stage // ROWS) % stage}" for row in range(ROWS)])
                with torch.no_grad():
                    bank.model(input_ids=ids, logits_to_keep=1, use_cache=False)

            seconds = alternate({"replace": replace, "serve": serve}, repeats)
            per_finetune = 4 * sum(p[0].numel() for p in bank.parameters())
            report(
                finetunes=stage,
                replace_ms=round(1000 * seconds["replace"], 1),
                batch_of_32_rows_ms=round(1000 * seconds["serve"], 1),
                finetunes_mb=round(stage * per_finetune / 1e6, 1),
                base_mb=round(base_bytes / 1e6, 1),
            )


if __name__ == "__main__":
    auto_cli(hot_bank)

"""What adapters cost: training steps, mixed batches and joint training, ours and peft's, beside the frozen base.

The embedded language model in the dtype that the processor multiplies fast. Cases alternate in one process; one JSON
line per case with medians.

    python benchmarks/adapters.py --repeats 7
"""

from collections.abc import Callable, Sequence
from typing import Any

import peft
import torch
from jsonargparse import auto_cli
from timing import alternate, report
from torch import Tensor, nn

from mmpeft.adapters import AdapterBank, AdapterConfig, IA3Config, LoraConfig
from mmpeft.models.language import LanguageConfig, load_language_model
from mmpeft.training.malloc import keep_freed_memory

TRAINED: dict[str, tuple[AdapterConfig, Any]] = {
    "LoRA all linears": (
        LoraConfig(rank=16, alpha=32, target_modules="all-linear"),
        peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    ),
    "LoRA q,v": (
        LoraConfig(rank=16, alpha=32, target_modules=["q_proj", "v_proj"]),
        peft.LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"]),
    ),
    "IA3": (
        IA3Config(),
        peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ),
}
SERVED = (1, 8, 32)
"""Finetunes in a batch of `ROWS` rows."""
ROWS, LENGTH = 32, 32
JOINT, JOINT_ROWS = 8, 2
"""Finetunes that train together, and rows of each in a step."""
JOINT_LENGTHS = (16, 32, 64, 128)


def adapters(repeats: int = 7, part: str = "all") -> None:
    """Times what adapters add.

    Args:
        repeats: rounds over all cases of a part.
        part: "train", "serve", "joint" or "all".
    """
    keep_freed_memory()
    torch.manual_seed(0)
    if part in ("train", "all"):
        training_steps(repeats)
    if part in ("serve", "all"):
        mixed_batches(repeats)
    if part in ("joint", "all"):
        joint_training(repeats)


def training_steps(repeats: int) -> None:
    """Forward and backward of 4 rows of 128 tokens; the frozen base gives a gradient to its inputs alone."""
    embeds = _embeds(4, 128)
    cases: dict[str, Callable[[], Any]] = {"frozen base": _step(_base(), embeds)}
    for name, (own, theirs) in TRAINED.items():
        bank = AdapterBank(_base())
        bank.add("a", own)
        bank.route(["a"] * 4)
        cases[f"mmpeft {name}"] = _step(bank.model, embeds, bank)
        cases[f"peft {name}"] = _step(_peft(theirs), embeds)
    seconds = alternate(cases, repeats)
    for name, median in seconds.items():
        ratio = {"times_base": round(median / seconds["frozen base"], 3)}
        if name.startswith("mmpeft"):
            ratio["times_peft"] = round(median / seconds[name.replace("mmpeft", "peft")], 3)
        report(benchmark="training step", case=name, seconds=round(median, 3), **ratio)


def mixed_batches(repeats: int) -> None:
    """Forward of 32 rows of 32 tokens, served by 1, 8 and 32 finetunes by turns."""
    ids = torch.randint(1000, (ROWS, LENGTH))
    names = {n: [f"finetune{row % n}" for row in range(ROWS)] for n in SERVED}
    cases: dict[str, Callable[[], Any]] = {"frozen base": _forward(_base(), ids)}
    for method in ("LoRA q,v", "IA3"):
        bank = AdapterBank(_base())
        for number in range(max(SERVED)):
            bank.add(f"finetune{number}", TRAINED[method][0], seed=number)
        for count in SERVED:
            cases[f"mmpeft {method}, {count} finetunes"] = _routed(bank, names[count], ids)
    theirs = _peft(TRAINED["LoRA q,v"][1], max(SERVED)).eval()
    for count in SERVED:
        cases[f"peft LoRA q,v, {count} finetunes"] = _forward(theirs, ids, adapter_names=names[count])
    seconds = alternate(cases, repeats)
    base = seconds["frozen base"]
    for name, median in seconds.items():
        row = {"added_ms": round(1000 * (median - base), 1), "times_base": round(median / base, 3)}
        report(benchmark="mixed batch", case=name, seconds=round(median, 4), **row)


def joint_training(repeats: int) -> None:
    """A step of 8 T-Few finetunes of 2 rows each, in one pass and one after the other, for rows of several lengths.

    The frozen base's ratio says how much of it is the processor, which multiplies few tokens less well than many.
    """
    bank = AdapterBank(_base())
    for number in range(JOINT):
        bank.add(f"finetune{number}", IA3Config(), seed=number)
    bank.route([f"finetune{number}" for number in range(JOINT) for _ in range(JOINT_ROWS)])
    alone = AdapterBank(_base())
    alone.add("finetune", IA3Config())
    alone.route(["finetune"] * JOINT_ROWS)
    base = _base()
    for length in JOINT_LENGTHS:
        embeds = _embeds(JOINT * JOINT_ROWS, length)
        cases = {
            "one pass": _step(bank.model, embeds, bank),
            "one after the other": _steps(alone.model, embeds, alone),
            "frozen base, one pass": _step(base, embeds),
            "frozen base, one after the other": _steps(base, embeds),
        }
        seconds = alternate(cases, repeats)
        for name, median in seconds.items():
            separate = seconds[name.replace("one pass", "one after the other")]
            report(
                benchmark=f"joint training of {JOINT} T-Few finetunes",
                tokens_per_row=length,
                case=name,
                seconds=round(median, 3),
                times_separate=round(median / separate, 3),
            )


def _base() -> Any:
    return load_language_model(LanguageConfig())


def _peft(config: Any, count: int = 1) -> nn.Module:
    model = peft.get_peft_model(_base(), config, adapter_name="finetune0")
    for number in range(1, count):
        model.add_adapter(f"finetune{number}", config)
    return model


def _embeds(rows: int, length: int) -> Tensor:
    return _base().get_input_embeddings()(torch.randint(1000, (rows, length))).detach()


def _step(model: Any, embeds: Tensor, bank: AdapterBank | None = None) -> Callable[[], None]:
    trained = model if bank is None else bank

    def run() -> None:
        inputs = embeds.clone().requires_grad_()
        model(
            inputs_embeds=inputs, logits_to_keep=1, use_cache=False
        ).logits.float().square().mean().backward()
        trained.zero_grad()

    return run


def _steps(model: Any, embeds: Tensor, bank: AdapterBank | None = None) -> Callable[[], None]:
    steps = [_step(model, part, bank) for part in embeds.split(JOINT_ROWS)]

    def run() -> None:
        for step in steps:
            step()

    return run


def _forward(model: Any, ids: Tensor, **routing: Sequence[str]) -> Callable[[], Any]:
    def run() -> Any:
        with torch.no_grad():
            return model(input_ids=ids, logits_to_keep=1, use_cache=False, **routing)

    return run


def _routed(bank: AdapterBank, names: list[str], ids: Tensor) -> Callable[[], Any]:
    forward = _forward(bank.model, ids)

    def run() -> Any:
        bank.route(names)
        return forward()

    return run


if __name__ == "__main__":
    auto_cli(adapters)

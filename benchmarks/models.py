"""What several cases measure on: the embedded language model, ours with finetunes and peft's, and steps of them."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import peft
import torch
from torch import Tensor, nn

from mmpeft.adapters import AdapterBank, AdapterConfig, IA3Config, LoraConfig
from mmpeft.models.language import LanguageConfig, load_language_model

QV = ["q_proj", "v_proj"]
METHODS: dict[str, tuple[AdapterConfig, Any]] = {
    "LoRA all linears": (
        LoraConfig(rank=16, alpha=32, target_modules="all-linear"),
        peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    ),
    "LoRA q,v": (
        LoraConfig(rank=16, alpha=32, target_modules=QV),
        peft.LoraConfig(r=16, lora_alpha=32, target_modules=QV),
    ),
    "IA3": (
        IA3Config(),
        peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ),
}
"""Name -> ours and peft's."""
VOCABULARY = 1000
"""Ids below it are drawn."""


def base() -> Any:
    """The frozen embedded language model."""
    return load_language_model(LanguageConfig())


def names(count: int) -> list[str]:
    """Finetunes'."""
    return [f"finetune{number}" for number in range(count)]


def bank_of(config: AdapterConfig, count: int = 1, model: Any = None) -> AdapterBank:
    """A bank of so many fresh finetunes of one method."""
    bank = AdapterBank(base() if model is None else model)
    for number, name in enumerate(names(count)):
        bank.add(name, config, seed=number)
    return bank


def peft_of(config: Any, count: int = 1, model: Any = None) -> nn.Module:
    """The same by peft."""
    adapted = peft.get_peft_model(base() if model is None else model, config, adapter_name=names(1)[0])
    for name in names(count)[1:]:
        adapted.add_adapter(name, config)
    return adapted


def fill(bank: AdapterBank, adapters: Iterable[str], seed: int = 0) -> None:
    """Small random weights in place of those that change nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name in adapters:
        for _, stack, slot in bank.places(name):
            drawn = {
                key: 0.01 * torch.randn(tensor.shape, generator=generator)
                for key, tensor in stack.tensors(slot).items()
            }
            stack.fill(slot, drawn)


def embeds_of(rows: int, length: int, model: Any) -> Tensor:
    """(rows, length, dim) of random ids."""
    return model.get_input_embeddings()(torch.randint(VOCABULARY, (rows, length))).detach()


def step(model: Any, embeds: Tensor, trained: Any = None) -> Callable[[], None]:
    """Forward and backward, of which the inputs get a gradient too; ``trained`` owns what else does."""

    def run() -> None:
        inputs = embeds.clone().requires_grad_()
        logits = model(inputs_embeds=inputs, logits_to_keep=1, use_cache=False).logits
        logits.float().square().mean().backward()
        (model if trained is None else trained).zero_grad()

    return run


def one_after_the_other(steps: Sequence[Callable[[], Any]]) -> Callable[[], None]:
    """All of them as one run."""

    def run() -> None:
        for each in steps:
            each()

    return run


def forward(
    model: Any, ids: Tensor, route: Callable[[], Any] = lambda: None, **routing: Any
) -> Callable[[], Any]:
    """A forward of the last token's logits, routed before."""

    def run() -> Any:
        route()
        with torch.no_grad():
            return model(input_ids=ids, logits_to_keep=1, use_cache=False, **routing)

    return run

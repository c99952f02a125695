"""Merging folds a finetune into the base's weights: afterwards the base alone computes what the adapted model did.

==================== =========================== ==========================================================
base                 LoRA, DoRA, full            IA3
==================== =========================== ==========================================================
dense                ``W + c B A``, ``W + D``    ``diag(v) W``, ``diag(v) b`` and ``W diag(u)``
4 bits, absmax a     refused: quantises anew     ``a_block * v_row`` in fp32; the codes stay as they are
8 bits, row scales s refused: quantises anew     ``s |v|``, and the codes of rows with ``v < 0`` change sign
==================== =========================== ==========================================================

Scaling the columns of a quantised weight would mean quantising it again. In a gated feed-forward that is not
needed: ``down(u * act(gate x) * up x)`` is ``down(act(gate x) * (u * up x))``, so ``u`` scales the rows of
``up_proj``. BitFit goes into biases, where the base has them. Bottlenecks, prompts and prefixes are no change of a
weight and stay adapters. Packed experts are dense and take either.

How a method folds into a linear is its own affair: `AdapterConfig.fold`.
"""

from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import nn

from mmpeft.adapters.bank import AdapterBank
from mmpeft.adapters.entry import Place
from mmpeft.adapters.experts import dense_experts, split_path
from mmpeft.adapters.methods.base import AdapterConfig
from mmpeft.adapters.weight_updates import rounded_once
from mmpeft.errors import RefusedError


def merge(bank: AdapterBank, name: str) -> None:
    """Folds adapter ``name`` into the base and removes it from the bank.

    The bank's other finetunes stay, and from now on change the changed base.

    Raises:
        UnknownNameError: no such adapter.
        RefusedError: it holds NaN or infinite values, or a weight of the base cannot take it exactly, also because
            another layer shares it. The base and the bank are unchanged then.
    """
    sick = [key for key, tensor in bank.tensors(name).items() if not tensor.isfinite().all()]
    if sick:
        raise RefusedError(
            f"adapter {name!r} holds NaN or infinite values in {len(sick)} tensors, such as {sick[0]}; "
            "it diverged, and merging it would destroy the base"
        )
    for path, layer in bank.layers.items():
        experts = split_path(bank.model, path)
        if (experts[0] if experts else bank.model.get_submodule(path)) is not layer.base:
            raise RefusedError(
                f"{path} was replaced after adapters were added to it; add them to the new model"
            )
    _check_untied(bank.model, bank.entry(name).sites)
    acting = [(part.config, place) for part in bank.entry(name).parts for place in bank.places_of(part)]
    acting.sort(key=lambda each: each[1].stack.turn)
    folds: dict[str, list[Callable[[], None]]] = defaultdict(list)
    for config, place in acting:
        folds[place.path].append(_fold(bank.model, config, place))
    for path, own in folds.items():
        experts = split_path(bank.model, path)
        with nullcontext() if experts else rounded_once(bank.model.get_submodule(path)):
            for fold in own:
                fold()
    bank.remove(name)
    for layer in bank.layers.values():
        for stack in layer.stacks.values():
            stack.attach(layer.base, layer.plain)  # DoRA keeps norms of the base


def _fold(model: nn.Module, config: AdapterConfig, place: Place) -> Callable[[], None]:
    path, stack, slot = place
    experts = split_path(model, path)
    if experts is None:
        return config.fold(path, model, stack, slot)

    @torch.no_grad()
    def fold() -> None:
        weight = dense_experts(*experts)
        change = torch.zeros_like(weight, dtype=torch.float32)
        config.change_experts(change, weight.float(), stack, slot)
        weight.copy_(weight.float() + change)

    return fold


def _check_untied(model: nn.Module, sites: list[str]) -> None:
    """Raises:
    RefusedError: a weight to change is also that of a layer that the adapter leaves alone, such as a tied head's.
    """
    modules = {path: module for path, module in model.named_modules() if hasattr(module, "weight")}
    for path in sites:
        own = modules[path].weight if path in modules else None
        others = [
            p for p, module in modules.items() if own is not None and module.weight is own and p != path
        ]
        if others:
            raise RefusedError(
                f"{path} shares its weight with {others[0]}, which a merge would change too; untie them first "
                "(tie_word_embeddings: false and a copy of the weight), or serve the adapter"
            )


def unwrap(bank: AdapterBank) -> nn.Module:
    """The plain model: every adapted layer with its own forward again.

    Raises:
        RefusedError: the bank still holds adapters, which would be lost.
    """
    if bank.names:
        raise RefusedError(f"the bank still holds {', '.join(bank.names)}; merge or remove them first")
    for layer in bank.layers.values():
        layer.remove()
    for stacks in (bank.layers, bank.inputs, bank.stacks):
        stacks.clear()
    return bank.model

"""Weight change: how far a finetune moves the weights of its base: ``|W' - W| / |W|`` in Frobenius norms.

``W'`` is the weight that the adapted linear computes with: what a merge would write, before rounding. Of IA3 on
inputs it is ``W diag(u)`` of the linear itself, also where a merge scales another linear instead.
"""

from collections import defaultdict

import torch
from torch import nn

from mmpeft.adapters.bank import AdapterBank
from mmpeft.adapters.base_weights import read_weight
from mmpeft.adapters.entry import Place
from mmpeft.adapters.experts import dense_experts, split_path
from mmpeft.adapters.methods.base import AdapterConfig


@torch.no_grad()
def weight_changes(bank: AdapterBank, name: str) -> dict[str, float]:
    """The relative change of the weight of every linear that a finetune adapts, by the linear's path.

    A hybrid's parts act together, so where several sit on one linear it is the change by all of them. Of a fused
    projection it is the whole linear's. Methods that change no weight have no place here,
    see `AdapterConfig.changes_weight`.

    Raises:
        UnknownNameError: no such adapter.
        RefusedError: bitsandbytes has repacked a weight for inference.
    """
    acting: dict[str, list[tuple[AdapterConfig, Place]]] = defaultdict(list)
    for part in bank.entry(name).parts:
        if part.config.changes_weight:
            for place in bank.places_of(part):
                acting[place.path].append((part.config, place))
    return {path: _relative_change(path, bank.model, parts) for path, parts in acting.items()}


def _relative_change(path: str, model: nn.Module, parts: list[tuple[AdapterConfig, Place]]) -> float:
    if experts := split_path(model, path):
        weight = dense_experts(*experts).float()
        change = torch.zeros_like(weight)
        for config, (_, stack, slot) in sorted(parts, key=lambda each: each[1].stack.turn):
            config.change_experts(change, weight, stack, slot)
        return float(torch.linalg.vector_norm(change) / torch.linalg.vector_norm(weight))
    linear = model.get_submodule(path)
    weight = read_weight(path, linear)
    config, (_, stack, slot) = parts[0]
    norm = config.change_norm(stack, slot) if len(parts) == 1 else None
    if norm is None:
        change = torch.zeros_like(weight)
        for config, (_, stack, slot) in sorted(parts, key=lambda each: each[1].stack.turn):
            config.change_weight(change, weight, path, stack, slot)
        norm = torch.linalg.vector_norm(change)
    return float(norm / torch.linalg.vector_norm(weight))

"""How far a finetune moves the weights of its base: ``|W' - W| / |W|`` in Frobenius norms.

``W'`` is the weight that the adapted linear computes with: what a merge would write, before rounding. Of IA3 on
inputs it is ``W diag(u)`` of the linear itself, also where a merge scales another linear instead.
"""

from collections import defaultdict

import torch
from torch import Tensor

from mmpeft.adapters.bank import AdapterBank, Place
from mmpeft.adapters.base_weights import read_weight
from mmpeft.adapters.layer import ORDER
from mmpeft.adapters.methods.base import AdapterConfig
from mmpeft.adapters.methods.dora import DoraStack
from mmpeft.adapters.methods.full import FullConfig
from mmpeft.adapters.methods.ia3 import IA3Config
from mmpeft.adapters.methods.lora import LoraConfig
from mmpeft.adapters.targets import base_of, submodule

CHANGES_WEIGHT = (LoraConfig, IA3Config, FullConfig)
"""Configs of the methods that change a weight; DoRA's is a LoRA's."""


@torch.no_grad()
def weight_changes(bank: AdapterBank, name: str) -> dict[str, float]:
    """The relative change of the weight of every linear that a finetune adapts, by the linear's path.

    A hybrid's parts act together, so where several sit on one linear it is the change by all of them. Of a fused
    projection it is the whole linear's. What changes no weight has no place here, see `weightless`.

    Raises:
        UnknownNameError: no such adapter.
        RefusedError: bitsandbytes has repacked a weight for inference.
    """
    acting: dict[str, list[tuple[AdapterConfig, Place]]] = defaultdict(list)
    for part in bank.entry(name).parts:
        if isinstance(part.config, CHANGES_WEIGHT):
            for place in bank.places_of(part):
                acting[place.path].append((part.config, place))
    return {path: _relative_change(bank, path, parts) for path, parts in acting.items()}


def weightless(bank: AdapterBank, name: str) -> list[str]:
    """The methods of a finetune that change no weight: prompts, prefixes, bottlenecks, image prompts and BitFit.

    BitFit is among them because most bases have no biases that its own could be relative to, and where there is
    one, a share of a bias says nothing beside shares of weights.

    Raises:
        UnknownNameError: no such adapter.
    """
    configs = [part.config for part in bank.entry(name).parts]
    return [config.method for config in configs if not isinstance(config, CHANGES_WEIGHT)]


def _relative_change(bank: AdapterBank, path: str, parts: list[tuple[AdapterConfig, Place]]) -> float:
    weight = read_weight(path, base_of(submodule(bank.model, path)))
    first, place = parts[0]
    if len(parts) == 1 and isinstance(first, LoraConfig) and not isinstance(place.stack, DoraStack):
        tensors = place.stack.tensors(place.slot)
        norm = abs(first.scaling) * _norm_of_product(tensors["lora_B.weight"], tensors["lora_A.weight"])
    else:
        change = torch.zeros_like(weight)
        for config, place in sorted(parts, key=lambda each: ORDER.index(each[0].place(path))):
            _add_change(change, weight, config, place)
        norm = torch.linalg.vector_norm(change)
    return float(norm / torch.linalg.vector_norm(weight))


def _add_change(change: Tensor, weight: Tensor, config: AdapterConfig, place: Place) -> None:
    """Turns ``change`` (O, I), what earlier parts did to ``weight`` (O, I), into what they and this one do.

    The difference itself is carried along: taking it from two weights would lose the digits that a small one has.
    """
    tensors = place.stack.tensors(place.slot)
    if isinstance(config, IA3Config):
        scale = tensors["ia3_l"].flatten() - 1
        # `change` is still zero: IA3 acts first, and two IA3 parts of a hybrid never share a linear
        change.addcmul_(weight, scale if config.scales_input(place.path) else scale[:, None])
    elif isinstance(config, FullConfig):
        change += tensors["weight_delta"]
    elif isinstance(config, LoraConfig):
        change.addmm_(tensors["lora_B.weight"], tensors["lora_A.weight"], alpha=config.scaling)
        if isinstance(place.stack, DoraStack):
            factor = place.stack.factors()[place.slot][:, None]
            change.mul_(factor).addcmul_(weight, factor - 1)


def _norm_of_product(B: Tensor, A: Tensor) -> Tensor:
    """``|B A|`` of (O, r) and (r, I), from ``|B A|^2 = <B^T B, A A^T>``, in fp64 because that squares them."""
    B, A = B.double(), A.double()
    return ((B.T @ B) * (A @ A.T)).sum().clamp(min=0).sqrt()

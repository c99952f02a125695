"""Retrained norms: a change of the weight that a norm multiplies what it has normalised with.

Norms are linear in that weight w, whether they multiply with w or with 1 + w: with n(x) what is normalised, a change d
adds ``d * n(x)``, and ``n(x) = f(x, w = 1) - f(x, w = 0)``. A norm of which that is not so is refused.

Source: PEFT's ``modules_to_save`` on norms.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmpeft.adapters.functional import gather_slots
from mmpeft.adapters.methods.base import Beyond, LayersConfig
from mmpeft.adapters.methods.stack import Stack
from mmpeft.adapters.weight_updates import add_weight
from mmpeft.errors import RefusedError


@dataclass
class NormWeightsConfig(LayersConfig):
    """Weights of chosen norms."""

    method: ClassVar[str] = "norm_weights"
    peft_type: ClassVar[str] = "MMPEFT_NORM_WEIGHTS"
    beyond: ClassVar[tuple[Beyond, ...]] = ("norms",)

    target_modules: str | list[str] = field(default_factory=list)
    """Paths or last names of norms."""

    def make_stack(self, path: str, in_features: int, out_features: int, num_slots: int, size: int) -> Stack:
        return NormWeightsStack(in_features, num_slots)

    @torch.no_grad()
    def check_layer(self, path: str, layer: nn.Module) -> None:
        norm, generator = _bare(layer), torch.Generator().manual_seed(0)
        weight: Any = norm._parameters["weight"]
        x, change = (torch.randn(n, len(weight), generator=generator).to(weight) for n in (3, 1))
        step = 1e-5 if weight.dtype == torch.float32 else 4 * torch.finfo(weight.dtype).eps
        try:
            changed, before = _with(norm, weight + change[0], x), _with(norm, weight, x)
            off = (changed - before - change * _normalised(norm, x)).abs().max()
            why = "" if off <= 10 * step * changed.abs().max() else "is not linear in its weight"
        except (TypeError, RuntimeError) as error:
            why = f"reads more than its input ({error})"
        if why:
            raise RefusedError(
                f"{path} is a {type(layer).__name__}, which {why}, so that a change of its weight is not served; apply "
                "the adapter in PEFT, by merge_and_unload, and serve the model that this makes"
            )

    def shapes(self, path: str, in_features: int, out_features: int) -> dict[str, list[int]]:
        return {"norm_delta": [in_features]}

    def changes_nothing(self, layer: nn.Module, tensors: dict[str, Tensor]) -> bool:
        return not tensors["norm_delta"].any()

    def fold(self, path: str, model: nn.Module, stack: Any, slot: int) -> Callable[[], None]:
        return partial(add_weight, model.get_submodule(path), stack.tensors(slot)["norm_delta"])


class NormWeightsStack(Stack):
    """The weight changes of every slot on one norm: ``norm_delta`` (S, I)."""

    method = NormWeightsConfig.method
    turn = 30

    def __init__(self, in_features: int, num_slots: int):
        super().__init__(num_slots)
        self.norm_delta = nn.Parameter(torch.zeros(num_slots, in_features))

    def attach(self, base: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
        self._norm = _bare(base)

    def on_output(self, x: Tensor, y: Tensor, slots: Tensor, uniform: bool) -> Tensor:
        def gather() -> tuple[Tensor]:
            return (gather_slots(self.norm_delta, self.effective(slots)).unsqueeze(1).to(y.dtype),)

        (deltas,) = self.for_rows((self.norm_delta,), gather, y.dtype)
        return y + (deltas * _normalised(self._norm, x)).to(y.dtype)

    def tensors(self, slot: int) -> dict[str, Tensor]:
        return {"norm_delta": self.norm_delta.detach()[slot]}


def _bare(norm: nn.Module) -> nn.Module:
    """The norm without adapters, which shares its tensors but can have another weight for a moment."""
    bare = copy.copy(norm)
    bare.__dict__.pop("forward", None)
    bare._parameters = dict(norm._parameters)
    return bare


def _normalised(norm: nn.Module, x: Tensor) -> Tensor:
    """n(x) of a bare norm."""
    weight: Any = norm._parameters["weight"]
    return _with(norm, torch.ones_like(weight), x) - _with(norm, torch.zeros_like(weight), x)


def _with(norm: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    own, norm._parameters["weight"] = norm._parameters["weight"], weight  # pyright: ignore
    try:
        return norm(x)
    finally:
        norm._parameters["weight"] = own

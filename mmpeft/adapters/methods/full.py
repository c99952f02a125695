"""Full fine-tuning of chosen linears: the baseline that the other methods are measured against.

A slot holds the change of the weight, ``y = (W + D_s) x``, so that it routes per row as every method does. With
no weight decay, training ``D`` from zero takes the steps of training ``W`` itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmpeft.adapters.functional import embedding_columns, gather_slots
from mmpeft.adapters.methods.base import Beyond, LayersConfig
from mmpeft.adapters.methods.stack import Stack
from mmpeft.adapters.weight_updates import add_weight, check_dense


@dataclass
class FullConfig(LayersConfig):
    """Every weight of chosen linears."""

    method: ClassVar[str] = "full"
    peft_type: ClassVar[str] = "MMPEFT_FULL"
    usual: ClassVar[dict[str, dict[str, Any]]] = {"full, all linears": {}}
    changes_weight: ClassVar[bool] = True
    beyond: ClassVar[tuple[Beyond, ...]] = ("head", "embedding")

    target_modules: str | list[str] = "auto"
    """Names of linears; "auto" is every linear of the blocks, "all-linear" also those outside of them."""

    def make_stack(self, path: str, in_features: int, out_features: int, num_slots: int, size: int) -> Stack:
        return FullStack(in_features, out_features, num_slots)

    def shapes(self, path: str, in_features: int, out_features: int) -> dict[str, list[int]]:
        return {"weight_delta": [out_features, in_features]}

    def changes_nothing(self, layer: nn.Module, tensors: dict[str, Tensor]) -> bool:
        return not tensors["weight_delta"].any()

    def fold(self, path: str, model: nn.Module, stack: Any, slot: int) -> Callable[[], None]:
        linear = model.get_submodule(path)
        check_dense(path, linear, self.method)
        return partial(add_weight, linear, stack.tensors(slot)["weight_delta"])

    def change_weight(self, change: Tensor, weight: Tensor, path: str, stack: Any, slot: int) -> None:
        change += stack.tensors(slot)["weight_delta"]


class FullStack(Stack):
    """The weight changes of every slot on one linear: ``weight_delta`` (S, O, I)."""

    method = FullConfig.method
    turn = 30

    def __init__(self, in_features: int, out_features: int, num_slots: int):
        super().__init__(num_slots)
        self.weight_delta = nn.Parameter(torch.zeros(num_slots, out_features, in_features))

    def on_output(self, x: Tensor, y: Tensor, slots: Tensor, uniform: bool) -> Tensor:
        if not x.is_floating_point():
            rows = embedding_columns(self.weight_delta, x, self.effective(slots))
            return y + (rows * self.output_scale).to(y.dtype)
        if self.one(uniform):
            return y + F.linear(x, self.weight_delta[0].to(x.dtype)).to(y.dtype)
        deltas = gather_slots(self.weight_delta, self.effective(slots)).to(x.dtype)
        return y + torch.bmm(x, deltas.transpose(1, 2)).to(y.dtype)

    def tensors(self, slot: int) -> dict[str, Tensor]:
        return {"weight_delta": self.weight_delta.detach()[slot]}

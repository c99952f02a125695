"""A toy method, scale and shift of a linear's outputs: what one file must say for all of the adapters to serve it.

``y * (1 + v) + c``. A slot holds v and c, so that zero is the base model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmpeft.adapters.functional import gather_slots, ia3_scale
from mmpeft.adapters.methods.base import AdapterConfig
from mmpeft.adapters.methods.registry import METHODS
from mmpeft.adapters.methods.stack import Stack
from mmpeft.adapters.weight_updates import add_bias, check_rows_scale, scale_rows
from mmpeft.errors import RefusedError


@dataclass
class ToyConfig(AdapterConfig):
    """Scale and shift of chosen linears' outputs."""

    method: ClassVar[str] = "toy"
    peft_type: ClassVar[str] = "MMPEFT_TOY"
    changes_weight: ClassVar[bool] = True

    target_modules: str | list[str] = "auto"
    layers: list[int] | str | None = None

    def make_stack(self, path: str, in_features: int, out_features: int, num_slots: int, size: int) -> Stack:
        return ToyStack(out_features, num_slots)

    def shapes(self, path: str, in_features: int, out_features: int) -> dict[str, list[int]]:
        return {"scale": [out_features], "shift": [out_features]}

    def fold(self, path: str, model: nn.Module, stack: Any, slot: int) -> Callable[[], None]:
        linear: Any = model.get_submodule(path)
        check_rows_scale(path, linear)
        if linear.bias is None:
            raise RefusedError(f"{path} has no bias in this architecture")
        scale, shift = stack.tensors(slot).values()

        def fold_toy() -> None:
            scale_rows(linear, 1 + scale)
            add_bias(linear, shift)

        return fold_toy

    def change_weight(self, change: Tensor, weight: Tensor, path: str, stack: Any, slot: int) -> None:
        scale = stack.tensors(slot)["scale"][:, None]
        change.mul_(1 + scale).addcmul_(weight, scale)


class ToyStack(Stack):
    """``scale`` and ``shift`` (S, O) of every slot on one linear."""

    method = ToyConfig.method

    def __init__(self, out_features: int, num_slots: int):
        super().__init__(num_slots)
        self.scale = nn.Parameter(torch.zeros(num_slots, out_features))
        self.shift = nn.Parameter(torch.zeros(num_slots, out_features))

    def on_output(self, x: Tensor, y: Tensor, slots: Tensor, uniform: bool) -> Tensor:
        if self.one(uniform):
            return ia3_scale(y, self.scale[0]) + self.shift[0].to(y.dtype)
        slots = self.effective(slots)
        scale, shift = (gather_slots(stack, slots).unsqueeze(1) for stack in (self.scale, self.shift))
        return ia3_scale(y, scale) + shift.to(y.dtype)

    def tensors(self, slot: int) -> dict[str, Tensor]:
        return {"scale": self.scale.detach()[slot], "shift": self.shift.detach()[slot]}


METHODS.append(ToyConfig)

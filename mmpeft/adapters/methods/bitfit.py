"""BitFit: only biases train; a linear without bias gets one.

Source: Ben Zaken et al. 2021. A slot holds the change of the bias, so that zero is the base model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmpeft.adapters.functional import gather_slots
from mmpeft.adapters.methods.base import Beyond, LayersConfig
from mmpeft.adapters.methods.stack import Stack
from mmpeft.adapters.weight_updates import add_bias
from mmpeft.errors import RefusedError


@dataclass
class BitFitConfig(LayersConfig):
    """Biases of chosen linears."""

    method: ClassVar[str] = "bitfit"
    peft_type: ClassVar[str] = "MMPEFT_BITFIT"
    beyond: ClassVar[tuple[Beyond, ...]] = ("head", "norms")
    usual: ClassVar[dict[str, dict[str, Any]]] = {"BitFit": {}}

    target_modules: str | list[str] = "auto"
    """Names of linears; "auto" is every linear of the blocks, "all-linear" also those outside of them."""

    def make_stack(self, path: str, in_features: int, out_features: int, num_slots: int, size: int) -> Stack:
        return BitFitStack(out_features, num_slots)

    def shapes(self, path: str, in_features: int, out_features: int) -> dict[str, list[int]]:
        return {"bias_delta": [out_features]}

    def changes_nothing(self, layer: nn.Module, tensors: dict[str, Tensor]) -> bool:
        return not tensors["bias_delta"].any()

    def fold(self, path: str, model: nn.Module, stack: Any, slot: int) -> Callable[[], None]:
        linear: Any = model.get_submodule(path)
        if linear.bias is None:
            raise RefusedError(
                f"{path} has no bias in this architecture, so a plain model has no place for one; serve the adapter"
            )
        return partial(add_bias, linear, stack.tensors(slot)["bias_delta"])


class BitFitStack(Stack):
    """The bias changes of every slot on one linear: ``bias_delta`` (S, O)."""

    method = BitFitConfig.method
    turn = 40

    def __init__(self, out_features: int, num_slots: int):
        super().__init__(num_slots)
        self.bias_delta = nn.Parameter(torch.zeros(num_slots, out_features))

    def on_output(self, x: Tensor, y: Tensor, slots: Tensor, uniform: bool) -> Tensor:
        if self.one(uniform):
            return y + self.bias_delta[0].to(y.dtype)

        def gather() -> tuple[Tensor]:
            return (gather_slots(self.bias_delta, self.effective(slots)).unsqueeze(1).to(y.dtype),)

        return torch.add(y, *self.for_rows((self.bias_delta,), gather, y.dtype))

    def tensors(self, slot: int) -> dict[str, Tensor]:
        return {"bias_delta": self.bias_delta.detach()[slot]}

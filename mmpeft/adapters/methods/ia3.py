"""IA3 (T-Few): learned vectors that rescale keys, values and the feed-forward's inner activation.

A slot holds ``delta = l - 1`` so that zero is the base model; files hold ``l``, as PEFT's do.

Source: Liu et al. 2022, section 3.3. For a gated feed-forward ``down(act(gate x) * up x)`` scaling the input
of ``down`` equals scaling the output of ``up``, which is the paper's place (T5's ``wi_1``).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from mmpeft.adapters.functional import gather_slots, ia3_scale
from mmpeft.adapters.methods.base import AdapterConfig, Stack, names_module

FEEDFORWARD_OUT = ["down_proj", "fc2", "mlp.c_proj", "dense_4h_to_h"]
"""Names of the feed-forward's last linear, where IA3 scales the input. GPT-2 calls the attention's c_proj too."""


@dataclass
class IA3Config(AdapterConfig):
    """Rescaling vectors on chosen linears."""

    method: ClassVar[str] = "ia3"

    target_modules: str | list[str] = "auto"
    """Names of linears, or "auto": keys, values and the feed-forward's last linear of this architecture."""
    feedforward_modules: str | list[str] = "auto"
    """Those of the targets whose *input* is scaled; the others are scaled at their output."""
    layers: list[int] | str | None = None
    """Only these decoder layers: numbers, "8-15", "8:", "last 50%", "middle 1/3"; None is all."""

    def scales_input(self, path: str) -> bool:
        """Whether the vector of this site scales the linear's input rather than its output."""
        modules = FEEDFORWARD_OUT if self.feedforward_modules == "auto" else self.feedforward_modules
        return names_module(path, modules)

    def place(self, path: str) -> str:
        return "ia3_input" if self.scales_input(path) else "ia3_output"

    def make_stack(self, path: str, in_features: int, out_features: int, num_slots: int, size: int) -> Stack:
        if self.scales_input(path):
            return IA3Stack(in_features, "input", num_slots)
        return IA3Stack(out_features, "output", num_slots)

    def shapes(self, path: str, in_features: int, out_features: int) -> dict[str, list[int]]:
        return {"ia3_l": [1, in_features] if self.scales_input(path) else [out_features, 1]}


class IA3Stack(Stack):
    """The vectors of every slot on one side of one linear.

    Shape: ``ia3_delta`` (S, features).
    """

    method = IA3Config.method
    origin = 1.0
    fixed: Tensor

    def __init__(self, features: int, side: Literal["input", "output"], num_slots: int):
        super().__init__(num_slots)
        self.side = side
        self.ia3_delta = nn.Parameter(torch.zeros(num_slots, features))
        self.register_buffer("fixed", torch.zeros(num_slots, features, dtype=torch.bool), persistent=False)
        self.has_fixed = False

    def on_input(self, x: Tensor, slots: Tensor, uniform: bool) -> Tensor:
        return self._scale(x, slots, uniform) if self.side == "input" else x

    def on_output(self, x: Tensor, y: Tensor, slots: Tensor, uniform: bool) -> Tensor:
        return self._scale(y, slots, uniform) if self.side == "output" else y

    def _scale(self, x: Tensor, slots: Tensor, uniform: bool) -> Tensor:
        delta = self.ia3_delta
        if self.has_fixed:
            delta = torch.where(self.fixed, delta.detach(), delta)
        if self.one(uniform):
            return ia3_scale(x, delta[0])
        return ia3_scale(x, gather_slots(delta, self.effective(slots)).unsqueeze(1))

    def train_only(self, slot: int, features: Tensor) -> None:
        """Keeps the slot's other features from training: the queries of a fused projection.

        Args:
            slot: of the finetune.
            features: (n,) int64, those that may change.
        """
        self.fixed[slot] = True
        self.fixed[slot, features] = False
        self.has_fixed = True

    def reset(self, slot: int) -> None:
        super().reset(slot)
        self.has_fixed = bool(self.fixed.any())

    def tensors(self, slot: int) -> dict[str, Tensor]:
        """``ia3_l`` (1, I) for an input side, (O, 1) for an output side; a copy, not a view."""
        vector = self.ia3_delta.detach()[slot] + 1
        return {"ia3_l": vector[None, :] if self.side == "input" else vector[:, None]}

    @torch.no_grad()
    def fill(self, slot: int, tensors: dict[str, Tensor]) -> None:
        self.ia3_delta[slot] = tensors["ia3_l"].flatten().to(self.ia3_delta) - 1

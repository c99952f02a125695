"""Bottleneck adapters: a small two-layer network beside or after a layer of the block.

``y + c * (U relu(D z + d) + u)``; *sequential* reads the layer's output, ``z = y`` (Houlsby et al. 2019; after the
feed-forward alone: Pfeiffer et al. 2021), *parallel* its input, ``z = x`` (He et al. 2022, section 4.6).
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mmpeft.adapters.functional import gather_slots
from mmpeft.adapters.methods.base import LayersConfig
from mmpeft.adapters.methods.stack import Stack, linear_start
from mmpeft.errors import RefusedError


@dataclass
class BottleneckConfig(LayersConfig):
    """Small networks on chosen layers."""

    method: ClassVar[str] = "bottleneck"
    peft_type: ClassVar[str] = "MMPEFT_BOTTLENECK"
    usual: ClassVar[dict[str, dict[str, Any]]] = {"bottleneck of 64": {"width": 64}}
    whole_feedforwards: ClassVar[bool] = True

    width: int = 64
    """Hidden units of each adapter."""
    reads: Literal["output", "input"] = "output"
    """"output" puts the adapter after the layer (sequential), "input" beside it (parallel)."""
    scaling: float = 1.0
    """Factor of the adapter's contribution; He et al. use 4 in parallel."""
    target_modules: str | list[str] = "auto"
    """Names of linears or of the blocks' feed-forward; "auto" is the whole feed-forward of each block."""

    def __post_init__(self):
        if not isinstance(self.width, int) or self.width < 1:
            raise RefusedError(
                f"BottleneckConfig.width is {self.width!r}; it must be an integer of at least 1"
            )
        if not math.isfinite(self.scaling):
            raise RefusedError(f"BottleneckConfig.scaling is {self.scaling!r}; it must be a finite number")

    @property
    def size(self) -> int:
        return self.width

    def place(self, path: str) -> str:
        return "bottleneck_sequential" if self.reads == "output" else "bottleneck_parallel"

    def make_stack(self, path: str, in_features: int, out_features: int, num_slots: int, size: int) -> Stack:
        return BottleneckStack(in_features, out_features, self.reads, num_slots, size)

    def shapes(self, path: str, in_features: int, out_features: int) -> dict[str, list[int]]:
        read = out_features if self.reads == "output" else in_features
        return {
            "adapter_down.weight": [self.width, read],
            "adapter_down.bias": [self.width],
            "adapter_up.weight": [out_features, self.width],
            "adapter_up.bias": [out_features],
        }

    def changes_nothing(self, layer: nn.Module, tensors: dict[str, Tensor]) -> bool:
        return not (tensors["adapter_up.weight"].any() or tensors["adapter_up.bias"].any())


class BottleneckStack(Stack):
    """The networks of every slot on one layer; narrower ones are padded with zeros, which stay zero.

    Shapes: ``down`` (S, R, I or O), ``down_bias`` (S, R), ``up`` (S, O, R), ``up_bias`` (S, O).
    """

    method = BottleneckConfig.method
    turn = 50
    size_dims: ClassVar[dict[str, int]] = {"down": 1, "down_bias": 1, "up": 2}
    scaling: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        reads: Literal["output", "input"],
        num_slots: int,
        width: int,
    ):
        super().__init__(num_slots)
        self.reads = reads
        read = out_features if reads == "output" else in_features
        self.down = nn.Parameter(torch.zeros(num_slots, width, read))
        self.down_bias = nn.Parameter(torch.zeros(num_slots, width))
        self.up = nn.Parameter(torch.zeros(num_slots, out_features, width))
        self.up_bias = nn.Parameter(torch.zeros(num_slots, out_features))
        self.register_buffer("scaling", torch.zeros(num_slots), persistent=False)

    def on_output(self, x: Tensor, y: Tensor, slots: Tensor, uniform: bool) -> Tensor:
        stacks = self.down, self.down_bias, self.up, self.up_bias, self.scaling

        def gather() -> tuple[Tensor, ...]:
            own = self.effective(slots)
            return tuple(gather_slots(stack, own).to(y.dtype) for stack in stacks)

        down, down_bias, up, up_bias, scaling = self.for_rows(stacks, gather, y.dtype)
        z = y if self.reads == "output" else x
        hidden = torch.relu(torch.baddbmm(down_bias[:, None], z, down.transpose(1, 2)))
        change = torch.baddbmm(up_bias[:, None], hidden, up.transpose(1, 2))
        return y + scaling[:, None, None] * change

    @torch.no_grad()
    def open(self, slot: int, config: BottleneckConfig, generator: torch.Generator) -> None:
        """The first layer Kaiming-uniform, the second zero: the slot begins as the base but can learn."""
        super().open(slot, config, generator)
        start = linear_start(config.width, self.down.shape[-1], generator=generator)
        self.down[slot, : config.width] = start
        self.scaling[slot] = config.scaling

    def tensors(self, slot: int) -> dict[str, Tensor]:
        width = self.sizes[slot]
        return {
            "adapter_down.weight": self.down.detach()[slot, :width],
            "adapter_down.bias": self.down_bias.detach()[slot, :width],
            "adapter_up.weight": self.up.detach()[slot, :, :width],
            "adapter_up.bias": self.up_bias.detach()[slot],
        }

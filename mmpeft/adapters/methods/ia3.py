"""IA3 (T-Few): learned vectors that rescale keys, values and the feed-forward's inner activation.

A slot holds ``delta = l - 1`` so that zero is the base model; files hold ``l``, as PEFT's do.

Source: Liu et al. 2022, section 3.3. For a gated feed-forward ``down(act(gate x) * up x)`` scaling the input
of ``down`` equals scaling the output of ``up``, which is the paper's place (T5's ``wi_1``).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mmpeft.adapters.base_weights import is_quantised
from mmpeft.adapters.functional import gather_slots, ia3_scale
from mmpeft.adapters.methods.base import (
    AdapterConfig,
    Beyond,
    LayersConfig,
    ModelInputs,
    TargetNames,
    names_module,
    required,
)
from mmpeft.adapters.methods.stack import Stack
from mmpeft.adapters.roles import Role
from mmpeft.adapters.weight_updates import (
    DEQUANTIZE_FIRST,
    check_rows_scale,
    scale_columns,
    scale_rows,
)
from mmpeft.errors import RefusedError

FEEDFORWARD_OUT = ["down_proj", "fc2", "mlp.c_proj", "dense_4h_to_h"]
"""Names of the feed-forward's last linear, where IA3 scales the input. GPT-2 calls the attention's c_proj too."""
EXPERTS_TYPE = "MMPEFT_IA3"
"""``peft_type`` of a file that also has vectors of packed experts."""
GATED_FEEDFORWARD = {"gate_proj", "up_proj", "down_proj"}
"""The children with weights of a feed-forward ``down(act(gate x) * up x)``. One more, such as BitNet's norm
before ``down_proj``, and scaling its input is no longer scaling ``up_proj``'s output."""


@dataclass
class IA3Config(LayersConfig):
    """Rescaling vectors on chosen linears."""

    method: ClassVar[str] = "ia3"
    peft_type: ClassVar[str] = "IA3"
    usual: ClassVar[dict[str, dict[str, Any]]] = {"IA3 (T-Few)": {}}
    auto: ClassVar[tuple[Role, ...]] = ("k", "v", "down")
    fields_of_targets: ClassVar[tuple[str, ...]] = ("feedforward_modules",)
    on_experts: ClassVar[bool] = True
    changes_weight: ClassVar[bool] = True
    beyond: ClassVar[tuple[Beyond, ...]] = ("head",)

    target_modules: str | list[str] = "auto"
    """Names of linears, "auto": keys, values and the feed-forward's last linear of this architecture, or a word as LoRA
    has it."""
    feedforward_modules: str | list[str] = "auto"
    """Those of the targets whose *input* is scaled; the others are scaled at their output. "auto" is the last linear of
    each feed-forward."""

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

    def make_experts_stack(
        self, path: str, num_experts: int, in_features: int, out_features: int, num_slots: int, size: int
    ) -> Stack:
        return ExpertsIA3Stack(num_experts, in_features, num_slots)

    def expert_shapes(
        self, path: str, num_experts: int, in_features: int, out_features: int
    ) -> dict[str, list[int]]:
        return {"ia3_l": [num_experts, in_features]}

    def check_experts(self, path: str) -> None:
        if not self.scales_input(path):
            raise RefusedError(
                f"{path} holds all experts of a mixture in one tensor, whose outputs IA3 does not scale; name the "
                "experts' down_proj alone, in feedforward_modules too"
            )

    def settled(self, downs: list[str]) -> AdapterConfig:
        return (
            replace(self, feedforward_modules=[*FEEDFORWARD_OUT, *downs])
            if self.feedforward_modules == "auto"
            else self
        )

    def trained_roles(self, path: str) -> tuple[Role, ...] | None:
        """By default keys and values: of a fused projection only their features are rescaled, where PEFT's default
        rescales the queries too. Whoever names the fused linear in ``target_modules`` means all of it, as in PEFT."""
        return self.roles

    @classmethod
    def from_peft(cls, raw: dict[str, Any]) -> AdapterConfig:
        return cls(required(raw, "target_modules"), raw.get("feedforward_modules") or [])

    def changes_nothing(self, layer: nn.Module, tensors: dict[str, Tensor]) -> bool:
        return bool((tensors["ia3_l"] == 1).all())

    def to_peft(self, sites: list[str], names: TargetNames, inputs: ModelInputs | None) -> dict[str, Any]:
        feedforward = names([path for path in sites if self.scales_input(path)])
        others = names([path for path in sites if not self.scales_input(path)])
        return {
            **self.peft_head(),
            "fan_in_fan_out": False,
            "target_modules": sorted(others + feedforward),
            "feedforward_modules": feedforward,
        }

    @classmethod
    def reads_peft(cls, raw: dict[str, Any]) -> bool:
        return raw.get("peft_type") in (cls.peft_type, EXPERTS_TYPE)

    def experts_to_peft(self, paths: list[str], fields: dict[str, Any]) -> dict[str, Any]:
        """PEFT's IA3 knows no experts and would drop them."""
        feedforward = [*fields["feedforward_modules"], *paths]
        targets = sorted([*fields["target_modules"], *paths])
        return {"peft_type": EXPERTS_TYPE, "target_modules": targets, "feedforward_modules": feedforward}

    def fold(self, path: str, model: nn.Module, stack: Any, slot: int) -> Callable[[], None]:
        """``diag(v) W`` or ``W diag(u)``; the columns of a quantised weight as the rows of another, see `merge`."""
        linear, scale = model.get_submodule(path), stack.tensors(slot)["ia3_l"].flatten()
        if self.scales_input(path):
            if not is_quantised(linear):
                return partial(scale_columns, linear, scale)
            path = _up_projection(model, path)
            linear = model.get_submodule(path)
        check_rows_scale(path, linear)
        return partial(scale_rows, linear, scale)

    def change_weight(self, change: Tensor, weight: Tensor, path: str, stack: Any, slot: int) -> None:
        scale = stack.tensors(slot)["ia3_l"].flatten() - 1
        # `change` is still zero: IA3 acts first, and two IA3 parts of a hybrid never share a linear
        change.addcmul_(weight, scale if self.scales_input(path) else scale[:, None])

    def change_experts(self, change: Tensor, weight: Tensor, stack: Any, slot: int) -> None:
        change.addcmul_(weight, stack.ia3_delta.detach()[slot][:, None])


class IA3Stack(Stack):
    """The vectors of every slot on one side of one linear.

    Shape: ``ia3_delta`` (S, features).
    """

    method = IA3Config.method
    turn = 0
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
        if self.one(uniform):
            return ia3_scale(x, self._deltas()[0])

        def gather() -> tuple[Tensor]:
            return (gather_slots(self._deltas(), self.effective(slots)).unsqueeze(1).to(x.dtype),)

        return ia3_scale(x, *self.for_rows((self.ia3_delta, self.fixed), gather, x.dtype))

    def _deltas(self) -> Tensor:
        """(S, features), of which those that are fixed get no gradient."""
        if not self.has_fixed:
            return self.ia3_delta
        return torch.where(self.fixed, self.ia3_delta.detach(), self.ia3_delta)

    def train_only(self, slot: int, features: Tensor) -> None:
        self.fixed[slot] = True
        self.fixed[slot, features] = False
        self.has_fixed = True

    def reset(self, slot: int) -> None:
        super().reset(slot)
        self.has_fixed = self.has_fixed and bool(self.fixed.any())  # which looks at all slots

    def tensors(self, slot: int) -> dict[str, Tensor]:
        """``ia3_l`` (1, I) for an input side, (O, 1) for an output side; a copy, not a view."""
        vector = self.ia3_delta.detach()[slot] + 1
        return {"ia3_l": vector[None, :] if self.side == "input" else vector[:, None]}

    @torch.no_grad()
    def fill(self, slot: int, tensors: dict[str, Tensor]) -> None:
        self.ia3_delta[slot] = tensors["ia3_l"].flatten().to(self.ia3_delta) - 1


class ExpertsIA3Stack(Stack):
    """The vectors of every slot on the inner activation of packed experts.

    Shape: ``ia3_delta`` (S, experts, features).
    """

    method = IA3Config.method
    turn = IA3Stack.turn
    origin = IA3Stack.origin

    def __init__(self, num_experts: int, features: int, num_slots: int):
        super().__init__(num_slots)
        self.ia3_delta = nn.Parameter(torch.zeros(num_slots, num_experts, features))

    def on_expert_input(self, x: Tensor, slot: int, expert: int) -> Tensor:
        return ia3_scale(x, self.ia3_delta[slot, expert])

    def tensors(self, slot: int) -> dict[str, Tensor]:
        """``ia3_l`` (experts, I); a copy, not a view."""
        return {"ia3_l": self.ia3_delta.detach()[slot] + 1}

    @torch.no_grad()
    def fill(self, slot: int, tensors: dict[str, Tensor]) -> None:
        self.ia3_delta[slot] = tensors["ia3_l"].to(self.ia3_delta) - 1


def _up_projection(model: nn.Module, path: str) -> str:
    """The linear whose rows are the columns of the quantised one at ``path``.

    Raises:
        RefusedError: it is not the last of a gated feed-forward.
    """
    parent, _, child = path.rpartition(".")
    block = model.get_submodule(parent)
    weighted = {name for name, module in block.named_children() if any(True for _ in module.parameters())}
    if child != "down_proj" or weighted != GATED_FEEDFORWARD:
        raise RefusedError(
            f"{path} is quantised and IA3 scales its input: that is exact only by way of up_proj in a gated "
            f"feed-forward of {', '.join(sorted(GATED_FEEDFORWARD))}; {parent or 'its parent'} has "
            f"{', '.join(sorted(weighted))}; {DEQUANTIZE_FIRST}"
        )
    return f"{parent}.up_proj".lstrip(".")

"""LoRA: ``y = Wx + (alpha / rank) B A x`` with the base frozen.

Source: Hu et al. 2021, section 4.1; rank-stabilised scaling ``alpha / sqrt(rank)`` from Kalajdzievski 2023.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mmpeft.adapters.functional import add_lora_of_one, gather_slots, lora_delta, lora_of_rows, low_rank
from mmpeft.adapters.methods.base import (
    AdapterConfig,
    Beyond,
    LayersConfig,
    ModelInputs,
    TargetNames,
    required,
)
from mmpeft.adapters.methods.lora_experts import ExpertsLoraStack, targets_of_peft
from mmpeft.adapters.methods.stack import Stack, linear_start
from mmpeft.adapters.patterns import by_pattern, entries_of
from mmpeft.adapters.roles import Role
from mmpeft.adapters.weight_updates import add_lora, check_dense
from mmpeft.errors import RefusedError

ORTHOGONAL_SCALE = 0.1
"""Standard deviation of an orthogonal start's numbers, as in PEFT."""
ROUNDING = 1e-6
"""Size of a product of A and B that counts as zero, relative to theirs."""
CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""PEFT's ways to start a LoRA that also change the base's weights: the tensors alone are not the adapter."""
OTHER_METHODS = ("use_dora", "alora_invocation_tokens")
"""Fields by which a LoRA's file is of another method."""


@dataclass
class LoraConfig(LayersConfig):
    """Low-rank updates of chosen linears."""

    method: ClassVar[str] = "lora"
    peft_type: ClassVar[str] = "LORA"
    usual: ClassVar[dict[str, dict[str, Any]]] = {
        "LoRA r=16": {"rank": 16},
        "LoRA r=16, all linears": {"rank": 16, "target_modules": "all-linear"},
    }
    auto: ClassVar[tuple[Role, ...]] = ("q", "v")  # Hu et al., table 5
    on_experts: ClassVar[bool] = True
    changes_weight: ClassVar[bool] = True
    second_factor: ClassVar[str | None] = "lora_B"
    beyond: ClassVar[tuple[Beyond, ...]] = ("head", "embedding")
    peft_refused: ClassVar[tuple[str, ...]] = (
        *("use_qalora", "use_bdlora", "kasa_config", "arrow_config", "monteclora_config"),
        "layer_replication",
    )

    rank: int = 16
    """Inner dimension r of the update."""
    alpha: float = 32.0
    """Numerator of the scaling alpha / r."""
    dropout: float = 0.0
    """Probability of dropping an input feature of A while training."""
    target_modules: str | list[str] = "auto"
    """Names of linears, or what they are in this architecture: "attention", "mlp", some of q, k, v, o, gate, up and
    down, such as "gate+up"; "auto" is "q+v". "all-linear" is all of them, "top-N" those that the loss depends on most,
    for at most N parameters."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) instead, which keeps large ranks learning."""
    start: Literal["kaiming", "orthogonal"] = "kaiming"
    """"kaiming" begins with B = 0; "orthogonal" with an A and a B that both learn at once and whose product is zero,
    to rounding."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Other ranks of some linears: pattern of the end of their path, such as "q_proj" or "layers.0.mlp.up_proj" ->
    rank; the first that matches counts."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Other alphas of some linears, in the same way."""

    def __post_init__(self):
        for where, rank in (("rank", self.rank), *entries_of(self.rank_pattern, "rank_pattern")):
            if not isinstance(rank, int) or rank < 1:
                raise RefusedError(f"LoraConfig.{where} is {rank!r}; it must be an integer of at least 1")
        for where, alpha in (("alpha", self.alpha), *entries_of(self.alpha_pattern, "alpha_pattern")):
            if not isinstance(alpha, int | float) or not math.isfinite(alpha):
                raise RefusedError(f"LoraConfig.{where} is {alpha!r}; it must be a finite number")
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise RefusedError(f"LoraConfig.dropout is {self.dropout!r}; it must be in [0, 1)")
        if self.start == "orthogonal" and (odd := [r for r in self._ranks() if r % 2]):
            raise RefusedError(f"LoraConfig.rank is {odd[0]}; an orthogonal start needs an even one")

    def rank_at(self, path: str) -> int:
        """The rank of the update of the linear at ``path``."""
        return by_pattern(self.rank_pattern, path, self.rank)

    def scaling_at(self, path: str) -> float:
        """The scaling of the update of the linear at ``path``."""
        rank, alpha = self.rank_at(path), by_pattern(self.alpha_pattern, path, self.alpha)
        return alpha / (rank**0.5 if self.rslora else rank)

    @property
    def scaling(self) -> float:
        """The scaling where no pattern says otherwise."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    @property
    def size(self) -> int:
        return max(self._ranks())

    def _ranks(self) -> list[int]:
        return [self.rank, *self.rank_pattern.values()]

    def make_stack(self, path: str, in_features: int, out_features: int, num_slots: int, size: int) -> Stack:
        return LoraStack(in_features, out_features, num_slots, size, path)

    def shapes(self, path: str, in_features: int, out_features: int) -> dict[str, list[int]]:
        rank = self.rank_at(path)
        return {"lora_A.weight": [rank, in_features], "lora_B.weight": [out_features, rank]}

    def make_experts_stack(
        self, path: str, num_experts: int, in_features: int, out_features: int, num_slots: int, size: int
    ) -> Stack:
        return ExpertsLoraStack(num_experts, in_features, out_features, num_slots, size, path)

    def expert_shapes(
        self, path: str, num_experts: int, in_features: int, out_features: int
    ) -> dict[str, list[int]]:
        ranks = num_experts * self.rank_at(path)
        return {"lora_A.weight": [ranks, in_features], "lora_B.weight": [out_features, ranks]}

    def check_experts(self, path: str) -> None:
        super().check_experts(path)
        if self.dropout or self.start != "kaiming":
            raise RefusedError(
                f"{path} holds all experts of a mixture in one tensor; LoRA changes it without dropout and from a "
                f"kaiming start (as PEFT), but dropout is {self.dropout} and start is {self.start!r}"
            )

    def check_fits(self, features: Sequence[tuple[int, int]]) -> None:
        """An update has no more ranks than its linear's smaller side; above the larger one of all, nothing is meant."""
        largest = max(max(sides) for sides in features)
        if self.rank > largest:
            raise RefusedError(
                f"{type(self).__name__}.rank is {self.rank}, but the largest side of the linears that it changes is "
                f"{largest}: set it to {min(min(sides) for sides in features)} at most; more adds nothing"
            )

    @classmethod
    def reads_peft(cls, raw: dict[str, Any]) -> bool:
        return super().reads_peft(raw) and not any(raw.get(field) for field in OTHER_METHODS)

    @classmethod
    def from_peft(cls, raw: dict[str, Any]) -> AdapterConfig:
        start = raw.get("init_lora_weights")
        if str(start).lower().startswith(CHANGES_BASE):
            raise RefusedError(
                f"init_lora_weights is {start!r}, which changes the base too, so that the tensors alone are not the "
                "adapter; convert it to a plain LoRA in PEFT by save_pretrained with "
                "path_initial_model_for_weight_conversion"
            )
        return cls(
            rank=required(raw, "r"),
            alpha=raw.get("lora_alpha", 8),
            dropout=raw.get("lora_dropout", 0.0),
            target_modules=targets_of_peft(raw),
            rslora=raw.get("use_rslora", False),
            rank_pattern=raw.get("rank_pattern") or {},
            alpha_pattern=raw.get("alpha_pattern") or {},
        )

    def changes_nothing(self, layer: nn.Module, tensors: dict[str, Tensor]) -> bool:
        """Where ``B A`` is zero, to rounding: also at an orthogonal start."""
        if not any((self.alpha, *self.alpha_pattern.values())):
            return True
        A, B = tensors["lora_A.weight"].double(), tensors["lora_B.weight"].double()
        return bool(_norm_of_product(A, B) <= ROUNDING * A.norm() * B.norm())

    def to_peft(self, sites: list[str], names: TargetNames, inputs: ModelInputs | None) -> dict[str, Any]:
        patterns = {"rank_pattern": self.rank_pattern, "alpha_pattern": self.alpha_pattern}
        return {
            **self.peft_head(),
            "target_modules": names(sites),
            "fan_in_fan_out": False,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.rslora,
            "bias": "none",
            **{field: pattern for field, pattern in patterns.items() if pattern},
        }

    def experts_to_peft(self, paths: list[str], fields: dict[str, Any]) -> dict[str, Any]:
        return {"target_parameters": paths}

    def fold(self, path: str, model: nn.Module, stack: Any, slot: int) -> Callable[[], None]:
        linear, (A, B, *_) = model.get_submodule(path), stack.tensors(slot).values()
        check_dense(path, linear, self.method)
        return partial(add_lora, linear, A, B, self.scaling_at(path))

    def change_weight(self, change: Tensor, weight: Tensor, path: str, stack: Any, slot: int) -> None:
        tensors = stack.tensors(slot)
        change.addmm_(tensors["lora_B.weight"], tensors["lora_A.weight"], alpha=self.scaling_at(path))

    def change_experts(self, change: Tensor, weight: Tensor, stack: Any, slot: int) -> None:
        scaling = self.scaling_at(stack.path)
        change.baddbmm_(stack.lora_B.detach()[slot], stack.lora_A.detach()[slot], alpha=scaling)

    def change_norm(self, stack: Any, slot: int) -> Tensor | None:
        A, B = (tensor.double() for tensor in stack.tensors(slot).values())
        return abs(self.scaling_at(stack.path)) * _norm_of_product(A, B)


class LoraStack(Stack):
    """The A and B of every slot on one linear. Slots of smaller rank are padded with zeros, a fixed point
    of training: the gradient of a zero row of A times a zero column of B is zero.

    Dropout is each slot's own where the routing has seeds for it: what a finetune drops is then a function of its seed,
    ``path`` and its own tokens. A compiled model, which cannot seed generators, draws from torch's global one.

    Shapes: ``lora_A`` (S, R, I), ``lora_B`` (S, O, R); ``lora_A[s, :r]`` is exactly PEFT's tensor.
    """

    method = LoraConfig.method
    turn = 20
    size_dims: ClassVar[dict[str, int]] = {"lora_A": 1, "lora_B": 2}
    scaling: Tensor
    dropout: Tensor

    def __init__(self, in_features: int, out_features: int, num_slots: int, rank: int, path: str = ""):
        super().__init__(num_slots)
        self.path = path
        self.lora_A = nn.Parameter(torch.zeros(num_slots, rank, in_features))
        self.lora_B = nn.Parameter(torch.zeros(num_slots, out_features, rank))
        self.register_buffer("scaling", torch.zeros(num_slots), persistent=False)
        self.register_buffer("dropout", torch.zeros(num_slots), persistent=False)
        self._rates: dict[int, float] = {}  # the dropout above zero, where no device has to be asked

    @property
    def has_dropout(self) -> bool:
        """Whether any slot drops features."""
        return bool(self._rates)

    def on_output(self, x: Tensor, y: Tensor, slots: Tensor, uniform: bool) -> Tensor:
        if self.training and self.has_dropout and x.is_floating_point():
            x = self._drop(x, slots)
        if self.one(uniform) and x.dtype == y.dtype and not torch.is_autocast_enabled(x.device.type):
            return add_lora_of_one(y, x, self.lora_A, self.lora_B, self.scaling)
        delta = self.delta(x, slots)
        return y + (delta if self.output_scale == 1 else delta * self.output_scale).to(y.dtype)

    def delta(self, x: Tensor, slots: Tensor) -> Tensor:
        """`lora_delta` of the rows' `effective` slots; in decoding, what it gathers is kept from step to step."""
        tensors = self.lora_A, self.lora_B, self.scaling
        if not x.is_floating_point():
            return lora_delta(x, *tensors, self.effective(slots))

        def gather() -> tuple[Tensor, Tensor]:
            return lora_of_rows(*tensors, self.effective(slots), x.dtype)

        return low_rank(x, *self.for_rows(tensors, gather, x.dtype))

    def _drop(self, x: Tensor, slots: Tensor) -> Tensor:
        probability = gather_slots(self.dropout, slots).view(-1, 1, 1)
        if torch.compiler.is_compiling() or not self.routing.streams:
            keep = torch.rand_like(x, dtype=torch.float32) >= probability
        else:
            keep = self.routing.kept(x, self.method, self._rates, f"{self.method} {self.path}")
        return torch.where(keep, x / (1 - probability).to(x.dtype), 0)

    @torch.no_grad()
    def open(self, slot: int, config: LoraConfig, generator: torch.Generator) -> None:
        """The slot begins as the base but can learn."""
        super().open(slot, config, generator)
        rank = self.sizes[slot] = config.rank_at(self.path)
        in_features, out_features = self.lora_A.shape[-1], self.lora_B.shape[1]
        if config.start == "orthogonal":
            basis, _ = torch.linalg.qr(torch.randn(rank, rank, generator=generator))
            half_A = torch.randn(in_features, rank // 2, generator=generator)
            half_B = torch.randn(out_features, rank // 2, generator=generator)
            self.lora_A[slot, :rank] = ORTHOGONAL_SCALE * (half_A @ basis[0::2]).T
            self.lora_B[slot, :, :rank] = ORTHOGONAL_SCALE * half_B @ basis[1::2]
        else:
            self.lora_A[slot, :rank] = linear_start(rank, in_features, generator=generator)
        self.scaling[slot] = config.scaling_at(self.path)
        self.dropout[slot] = config.dropout
        if config.dropout:
            self._rates[slot] = config.dropout

    def reset(self, slot: int) -> None:
        super().reset(slot)
        self._rates.pop(slot, None)

    def tensors(self, slot: int) -> dict[str, Tensor]:
        rank = self.sizes[slot]
        return {
            "lora_A.weight": self.lora_A.detach()[slot, :rank],
            "lora_B.weight": self.lora_B.detach()[slot, :, :rank],
        }


def _norm_of_product(A: Tensor, B: Tensor) -> Tensor:
    """``|B A|`` of fp64 (r, I) and (O, r), from ``|B A|^2 = <B^T B, A A^T>``, which squares them."""
    return ((B.T @ B) * (A @ A.T)).sum().clamp(min=0).sqrt()

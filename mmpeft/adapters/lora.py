"""LoRA: ``y = Wx + (alpha / rank) B A x`` with the base frozen.

Source: Hu et al. 2021, section 4.1; rank-stabilised scaling ``alpha / sqrt(rank)`` from Kalajdzievski 2023.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmpeft.adapters.functional import gather_slots, lora_delta, lora_delta_of_one
from mmpeft.adapters.stack import AdapterConfig, Occupancy, fits, grown


@dataclass
class LoraConfig(AdapterConfig):
    """Low-rank updates of chosen linears."""

    method: ClassVar[str] = "lora"

    rank: int = 16
    """Inner dimension r of the update."""
    alpha: float = 32.0
    """Numerator of the scaling alpha / r."""
    dropout: float = 0.0
    """Probability of dropping an input feature of A while training."""
    target_modules: str | list[str] = "auto"
    """Names of linears, "all-linear", or "auto": attention's q and v of this architecture."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) instead, which keeps large ranks learning."""

    def __post_init__(self):
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"LoraConfig.rank is {self.rank!r}; it must be an integer of at least 1")
        if not isinstance(self.alpha, int | float) or not math.isfinite(self.alpha):
            raise ValueError(f"LoraConfig.alpha is {self.alpha!r}; it must be a finite number")
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise ValueError(f"LoraConfig.dropout is {self.dropout!r}; it must be in [0, 1)")

    @property
    def scaling(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


class LoraStack(nn.Module):
    """The A and B of every slot on one linear. Slots of smaller rank are padded with zeros, a fixed point
    of training: the gradient of a zero row of A times a zero column of B is zero.

    Shapes: ``lora_A`` (S, R, I), ``lora_B`` (S, O, R); ``lora_A[s, :r]`` is exactly PEFT's tensor.
    """

    method = LoraConfig.method
    scaling: Tensor
    dropout: Tensor

    def __init__(self, in_features: int, out_features: int, num_slots: int, rank: int):
        super().__init__()
        self.lora_A = nn.Parameter(torch.zeros(num_slots, rank, in_features))
        self.lora_B = nn.Parameter(torch.zeros(num_slots, out_features, rank))
        self.register_buffer("scaling", torch.zeros(num_slots), persistent=False)
        self.register_buffer("dropout", torch.zeros(num_slots), persistent=False)
        self.has_dropout = False
        self.ranks = [0] * num_slots
        self.occupancy = Occupancy(num_slots)

    def delta(self, x: Tensor, slots: Tensor, uniform: bool) -> Tensor:
        """(B, T, I) -> (B, T, O); ``uniform`` promises one slot that serves every row."""
        if self.training and self.has_dropout:
            x = self._drop(x, slots)
        if uniform and not self.occupancy.partial:
            return lora_delta_of_one(x, self.lora_A[0], self.lora_B[0], self.scaling[0])
        return lora_delta(x, self.lora_A, self.lora_B, self.scaling, self.occupancy.effective(slots))

    def _drop(self, x: Tensor, slots: Tensor) -> Tensor:
        probability = gather_slots(self.dropout, slots).view(-1, 1, 1)
        keep = torch.rand_like(x, dtype=torch.float32) >= probability
        return torch.where(keep, x / (1 - probability).to(x.dtype), 0)

    @torch.no_grad()
    def open(self, slot: int, config: LoraConfig, generator: torch.Generator) -> None:
        """Starts the slot afresh: A Kaiming-uniform, B zero, so that it begins as the base but can learn."""
        self.reset(slot)
        bound = self.lora_A.shape[-1] ** -0.5  # kaiming_uniform(a=sqrt(5)), as nn.Linear and PEFT
        A = torch.empty(config.rank, self.lora_A.shape[-1]).uniform_(-bound, bound, generator=generator)
        self.lora_A[slot, : config.rank] = A
        self.ranks[slot] = config.rank
        self.scaling[slot] = config.scaling
        self.dropout[slot] = config.dropout
        self.has_dropout = self.has_dropout or config.dropout > 0
        self.occupancy.set(slot, True)

    @torch.no_grad()
    def reset(self, slot: int) -> None:
        """Empties the slot: its rows are base rows."""
        for tensor in (self.lora_A, self.lora_B, self.scaling, self.dropout):
            tensor[slot] = 0
        self.ranks[slot] = 0
        self.has_dropout = bool(self.dropout.any())
        self.occupancy.set(slot, False)

    def tensors(self, slot: int) -> dict[str, Tensor]:
        """Views of the slot by PEFT's names: ``lora_A.weight`` (r, I) and ``lora_B.weight`` (O, r)."""
        rank = self.ranks[slot]
        return {
            "lora_A.weight": self.lora_A.detach()[slot, :rank],
            "lora_B.weight": self.lora_B.detach()[slot, :, :rank],
        }

    @torch.no_grad()
    def fill(self, slot: int, tensors: dict[str, Tensor]) -> None:
        """Copies tensors named and shaped as `tensors` returns them into the slot."""
        for key, view in self.tensors(slot).items():
            view.copy_(tensors[key])

    def resize(self, num_slots: int, rank: int) -> None:
        if fits(self.lora_A, num_slots, rank):
            return
        self.lora_A = nn.Parameter(grown(self.lora_A, num_slots, rank))
        self.lora_B = nn.Parameter(grown(self.lora_B, num_slots, 0, rank))
        self.scaling, self.dropout = grown(self.scaling, num_slots), grown(self.dropout, num_slots)
        self.ranks += [0] * (num_slots - len(self.ranks))
        self.occupancy.resize(num_slots)

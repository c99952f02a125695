"""What every method's stack shares: slots that can be opened, filled, read and emptied in place."""

from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from mmpeft.adapters.functional import BASE


class AdapterConfig:
    """Base of the method configs; the CLI offers every subclass under ``adapter:``."""

    method: ClassVar[str]
    """The name that files, routing and reports use for the method."""

    target_modules: str | list[str]


class Stack(Protocol):
    """One method's tensors on one linear, dim 0 = slot. Shapes change only in `resize`."""

    method: str
    occupancy: "Occupancy"

    def tensors(self, slot: int) -> dict[str, Tensor]:
        """The slot's tensors as PEFT stores them, by PEFT's names."""
        ...

    def fill(self, slot: int, tensors: dict[str, Tensor]) -> None:
        """Copies such tensors into the slot."""
        ...

    def resize(self, num_slots: int, rank: int) -> None:
        """Grows to at least this size, keeping what the slots hold; the same Parameters if they fit."""
        ...


class Occupancy(nn.Module):
    """Which slots of a stack take part at all.

    A finetune need not target every wrapped module. Its rows must pass the others as base rows do, with no
    gradient: for LoRA a zero slot happens to be a fixed point of training, for IA3 it is not.
    """

    active: Tensor

    def __init__(self, num_slots: int):
        super().__init__()
        self.register_buffer("active", torch.zeros(num_slots, dtype=torch.bool), persistent=False)
        self.partial = True
        """Whether some slot is inactive."""

    def set(self, slot: int, active: bool) -> None:
        self.active[slot] = active
        self.partial = not bool(self.active.all())

    def resize(self, num_slots: int) -> None:
        self.active = grown(self.active, num_slots)
        self.partial = not bool(self.active.all())

    def effective(self, slots: Tensor) -> Tensor:
        """``slots`` (B,) with the rows of inactive slots turned into base rows.

        Always by the tensor, though nothing is to do when all are active: a branch on that would compile the
        model anew whenever the last free slot is taken.
        """
        return torch.where(self.active[slots.clamp(min=0)], slots, BASE)


def fits(tensor: Tensor, *sizes: int) -> bool:
    """Whether the leading dims of ``tensor`` already reach ``sizes``."""
    return all(have >= want for have, want in zip(tensor.shape, sizes, strict=False))


def grown(tensor: Tensor, *sizes: int) -> Tensor:
    """``tensor`` zero-padded at the end of its leading dims up to ``sizes``; never shrunk."""
    shape = [max(have, want) for have, want in zip(tensor.shape, sizes, strict=False)]
    out = tensor.new_zeros(*shape, *tensor.shape[len(sizes) :])
    out[tuple(slice(n) for n in tensor.shape)] = tensor.detach()
    return out

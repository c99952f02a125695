"""What every method's config and stack share: slots that can be opened, filled, read and emptied in place."""

import re
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mmpeft.adapters.functional import BASE, gather_slots


class AdapterConfig:
    """Base of the method configs; the CLI offers every subclass under ``adapter:``."""

    method: ClassVar[str]
    """The name that files, routing and reports use for the method."""
    home: ClassVar[Literal["layers", "inputs"]] = "layers"
    """Whether the method changes layers of the model or what the model reads."""

    target_modules: str | list[str] = "auto"
    """Which layers it changes."""
    layers: list[int] | str | None = None
    """Only those of these decoder layers, see `choose_layers`; None is all."""

    @property
    def size(self) -> int:
        """The dimension that may differ from slot to slot (rank, width, tokens); 0 for methods without."""
        return 0

    def parts(self) -> list["AdapterConfig"]:
        """The methods that a finetune consists of."""
        return [self]

    def place(self, path: str) -> str:
        """The key of the method's stack among those of the layer at ``path``."""
        return self.method

    def make_stack(
        self, path: str, in_features: int, out_features: int, num_slots: int, size: int
    ) -> "Stack":
        """An empty stack for the layer at ``path``. Every method has one; a hybrid has those of its parts."""
        raise NotImplementedError(f"{type(self).__name__} has no make_stack")

    def shapes(self, path: str, in_features: int, out_features: int) -> dict[str, list[int]]:
        """What `Stack.tensors` returns for a slot of this config: its names and shapes. Every method has them; a hybrid
        has those of its parts."""
        raise NotImplementedError(f"{type(self).__name__} has no shapes")


class Stack(nn.Module):
    """One method's tensors at one place of the model. Dim 0 of every Parameter and buffer is the slot.

    A slot of zeros is the base model. A finetune need not target every wrapped module: its rows must pass the
    others as base rows do, with no gradient. For LoRA a zero slot happens to be a fixed point of training, for
    IA3 it is not; ``active`` says which slots take part at all.
    """

    method: ClassVar[str]
    size_dims: ClassVar[dict[str, int]] = {}
    """Parameter -> the dim that is padded to the largest size of the slots."""
    origin: ClassVar[float] = 0.0
    """What a slot of zeros stands for in the method's own terms: IA3's vectors are ones where their delta is zero."""
    active: Tensor

    def __init__(self, num_slots: int):
        super().__init__()
        self.register_buffer("active", torch.zeros(num_slots, dtype=torch.bool), persistent=False)
        self.partial = True
        """Whether some slot is inactive."""
        self.sizes = [0] * num_slots
        """Each slot's own size: its rank, width or number of tokens."""

    def attach(self, base: nn.Module) -> None:
        """Shows the stack the frozen layer that it will sit on, for methods that depend on its weight."""

    def on_input(self, x: Tensor, slots: Tensor, uniform: bool) -> Tensor:
        """What the layer's base gets instead of ``x`` (B, T, I); ``uniform`` promises one slot that serves
        every row."""
        return x

    def on_output(self, x: Tensor, y: Tensor, slots: Tensor, uniform: bool) -> Tensor:
        """What the layer returns instead of ``y`` (B, T, O); ``x`` (B, T, I) is the layer's input."""
        return y

    def open(self, slot: int, config: Any, generator: torch.Generator) -> None:
        """Starts the slot afresh, as the base model but able to learn."""
        self.reset(slot)
        self.sizes[slot] = config.size
        self._set_active(slot, True)

    @torch.no_grad()
    def reset(self, slot: int) -> None:
        """Empties the slot: its rows are base rows."""
        for tensor in (*self.parameters(recurse=False), *self.buffers(recurse=False)):
            tensor[slot] = 0
        self.sizes[slot] = 0
        self._set_active(slot, False)

    def tensors(self, slot: int) -> dict[str, Tensor]:
        """The slot's tensors as PEFT names and shapes them. Every method has its own; nothing is common to all."""
        raise NotImplementedError(f"{type(self).__name__} has no tensors")

    @torch.no_grad()
    def fill(self, slot: int, tensors: dict[str, Tensor]) -> None:
        """Copies tensors named and shaped as `tensors` returns them into the slot."""
        for key, view in self.tensors(slot).items():
            view.copy_(tensors[key])

    def resize(self, num_slots: int, size: int) -> None:
        """Grows to at least this many slots of this size, keeping what they hold; the same Parameters if they
        fit."""
        for name, parameter in list(self.named_parameters(recurse=False)):
            wanted = [num_slots] + [0] * (parameter.dim() - 1)
            if name in self.size_dims:
                wanted[self.size_dims[name]] = size
            if not _fits(parameter, wanted):
                setattr(self, name, nn.Parameter(_grown(parameter, wanted)))
        for name, buffer in list(self.named_buffers(recurse=False)):
            if not _fits(buffer, [num_slots]):
                setattr(self, name, _grown(buffer, [num_slots]))
        self.sizes += [0] * (num_slots - len(self.sizes))
        self.partial = not bool(self.active.all())

    def own_dims(self, name: str, slot: int) -> tuple[slice, ...]:
        """What of a Parameter's slot is not padding: an index of its dims after the first."""
        if name not in self.size_dims:
            return ()
        return (*[slice(None)] * (self.size_dims[name] - 1), slice(self.sizes[slot]))

    def effective(self, slots: Tensor) -> Tensor:
        """``slots`` (B,) with the rows of inactive slots turned into base rows.

        A compiled model goes by the tensor even when all are active: a branch on that would compile it anew
        whenever the last free slot is taken.
        """
        if not torch.compiler.is_compiling() and not self.partial:
            return slots
        return torch.where(self.active[slots.clamp(min=0)], slots, BASE)

    def sizes_of(self, slots: Tensor) -> Tensor:
        """(B,) int64: the size of each row's slot; 0 for base rows."""
        return gather_slots(torch.tensor(self.sizes, device=slots.device), slots)

    def one(self, uniform: bool) -> bool:
        """Whether slot 0 serves every row of the batch."""
        return uniform and not self.partial

    def _set_active(self, slot: int, active: bool) -> None:
        self.active[slot] = active
        self.partial = not bool(self.active.all())


def names_module(path: str, names: str | list[str]) -> bool:
    """PEFT's rule: a list names modules by their path or the end of it, a string is a pattern for the whole
    path."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def _fits(tensor: Tensor, sizes: list[int]) -> bool:
    """Whether the leading dims of ``tensor`` already reach ``sizes``."""
    return all(have >= want for have, want in zip(tensor.shape, sizes, strict=False))


def _grown(tensor: Tensor, sizes: list[int]) -> Tensor:
    """``tensor`` zero-padded at the end of its leading dims up to ``sizes``; never shrunk."""
    shape = [max(have, want) for have, want in zip(tensor.shape, sizes, strict=False)]
    out = tensor.new_zeros(*shape, *tensor.shape[len(sizes) :])
    out[tuple(slice(n) for n in tensor.shape)] = tensor.detach()
    return out

"""The base of every method's stack: slots that can be opened, filled, read and emptied in place."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmpeft.adapters.functional import BASE, gather_slots
from mmpeft.adapters.routing import Routing
from mmpeft.transfer import to_device


class Stack(nn.Module):
    """One method's tensors at one place of the model. Dim 0 of every Parameter and buffer is the slot.

    A slot of zeros is the base model. A finetune need not target every adapted layer: its rows must pass the
    others as base rows do, with no gradient. For LoRA a zero slot happens to be a fixed point of training, for
    IA3 it is not; ``active`` says which slots take part at all.
    """

    method: ClassVar[str]
    size_dims: ClassVar[dict[str, int]] = {}
    """Parameter -> the dim that is padded to the largest size of the slots."""
    origin: ClassVar[float] = 0.0
    """What a slot of zeros stands for in the method's own terms: IA3's vectors are ones where their delta is zero."""
    turn: ClassVar[int] = 60
    """When it acts among the methods of a layer, smaller first: scaling (0), turning (10), adding to the weight (20),
    and so on to what reads the result (50)."""
    of_images: ClassVar[bool] = False
    """Whether it changes image features, so that text alone gives it no gradient."""
    active: Tensor

    def __init__(self, num_slots: int):
        super().__init__()
        self.register_buffer("active", torch.zeros(num_slots, dtype=torch.bool), persistent=False)
        self.partial = True
        """Whether some slot is inactive."""
        self.sizes = [0] * num_slots
        """Each slot's own size: its rank, width or number of tokens."""
        self.routing = Routing()
        """The bank's, as soon as it sits on a layer."""
        self.output_scale = 1.0
        """What an embedding multiplies its rows with, as Gemma's does."""

    def attach(self, base: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
        """Shows the stack the frozen layer that it will sit on, or the embedding, for methods that depend on its
        weight; ``forward`` is the layer's own, without adapters."""
        self.output_scale = float(getattr(base, "embed_scale", 1.0))

    def on_input(self, x: Tensor, slots: Tensor, uniform: bool) -> Tensor:
        """What the layer's base gets instead of ``x`` (B, T, I); ``uniform`` promises one slot that serves
        every row."""
        return x

    def on_output(self, x: Tensor, y: Tensor, slots: Tensor, uniform: bool) -> Tensor:
        """What the layer returns instead of ``y`` (B, T, O); ``x`` (B, T, I) is the layer's input."""
        return y

    def on_expert_input(self, x: Tensor, slot: int, expert: int) -> Tensor:
        """`on_input` for the tokens (n, I) of one slot that one of a layer's experts gets."""
        return x

    def on_expert_output(self, x: Tensor, y: Tensor, slot: int, expert: int) -> Tensor:
        """`on_output` for the tokens (n, I) and (n, O) of one slot at one of a layer's experts."""
        return y

    def change_images(self, features: Tensor, slots: Tensor) -> Tensor:
        """Image features (images, tokens, dim), and the slot of each image's row (images,), -> what the projector gets
        instead, of the same shape."""
        return features

    def virtual_embeds(self, slots: Tensor) -> Tensor | None:
        """Embeddings (B, R, dim) that the rows of ``slots`` (B,) read before their own tokens, each as many as its slot
        is large; None for methods without."""
        return None

    def virtual_keys_values(self, slots: Tensor, num_layers: int, num_heads: int) -> Tensor | None:
        """Keys and values (layers, 2, B, heads, R, head dim) that the rows of ``slots`` (B,) attend to before their
        own, each as many as its slot is large; None for methods without."""
        return None

    def train_only(self, slot: int, features: Tensor) -> None:
        """Keeps all but these output features (n,) int64 of a slot from training, where `AdapterConfig.trained_roles`
        says so."""
        raise NotImplementedError(f"{type(self).__name__} trains all features")

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

    def for_rows(
        self, made_of: Sequence[Tensor], make: Callable[[], tuple[Tensor, ...]], key: Hashable = None
    ) -> tuple[Tensor, ...]:
        """What ``make`` makes of the slots of the routing's rows; in decoding it is kept from step to step, as long as
        the stack's tensors ``made_of`` stay as they are.

        Args:
            key: tells it from what else the stack makes, such as of another dtype.
        """
        gathered = self.routing.gathered
        return make() if gathered is None else gathered.get((self, key), (*made_of, self.active), make)

    def sizes_of(self, slots: Tensor) -> Tensor:
        """(B,) int64: the size of each row's slot; 0 for base rows."""
        return gather_slots(to_device(self.sizes, slots.device), slots)

    def one(self, uniform: bool) -> bool:
        """Whether slot 0 serves every row of the batch."""
        return uniform and not self.partial

    def serves(self, slot: int) -> bool:
        """Whether the rows of a slot take part here."""
        return slot != BASE and (not self.partial or bool(self.active[slot]))

    def _set_active(self, slot: int, active: bool) -> None:
        self.active[slot] = active
        self.partial = not bool(self.active.all())


def linear_start(*shape: int, generator: torch.Generator) -> Tensor:
    """Numbers that PyTorch and PEFT start a linear's weight (O, I) or bias with: kaiming_uniform(a=sqrt(5))."""
    bound = shape[-1] ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _fits(tensor: Tensor, sizes: list[int]) -> bool:
    """Whether the leading dims of ``tensor`` already reach ``sizes``."""
    return all(have >= want for have, want in zip(tensor.shape, sizes, strict=False))


def _grown(tensor: Tensor, sizes: list[int]) -> Tensor:
    """``tensor`` zero-padded at the end of its leading dims up to ``sizes``; never shrunk."""
    shape = [max(have, want) for have, want in zip(tensor.shape, sizes, strict=False)]
    out = tensor.new_zeros(*shape, *tensor.shape[len(sizes) :])
    out[tuple(slice(n) for n in tensor.shape)] = tensor.detach()
    return out

"""The bank: which adapter sits in which slot of a model, and the one place that puts it there."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmpeft.adapters.functional import BASE
from mmpeft.adapters.inject import wrap_layer
from mmpeft.adapters.layer import AdapterLayer, Routing
from mmpeft.adapters.methods.base import AdapterConfig, Stack
from mmpeft.adapters.methods.ia3 import IA3Stack
from mmpeft.adapters.targets import find_sites, input_features, layer_features, trained_features
from mmpeft.errors import RefusedError, UnknownNameError

NAME_PATTERN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")
RESERVED_NAME = "base"
"""What people call the frozen model where they choose among adapters."""
INPUTS = "adapter_inputs"
"""The submodule of the model that holds the stacks of methods that change what it reads."""


@dataclass
class Part:
    """One method of an adapter."""

    config: AdapterConfig
    slot: int
    sites: list[str]
    """Paths of the layers that it changes; `INPUTS` for methods that change what the model reads."""


@dataclass
class Entry:
    """One adapter of a bank."""

    config: AdapterConfig
    parts: list[Part]

    @property
    def sites(self) -> list[str]:
        """Paths of everything that the adapter changes."""
        return list(dict.fromkeys(path for part in self.parts for path in part.sites))

    @property
    def slot(self) -> int:
        """The slot of an adapter of one method."""
        (part,) = self.parts
        return part.slot


class Place(NamedTuple):
    """Where an adapter keeps some of its tensors."""

    path: str
    stack: Stack
    slot: int


class AdapterBank:
    """Adapters by name on one frozen model.

    ``add`` wraps the layers it needs and opens a slot; ``route`` says which adapter serves each row of the
    next forward. Slots are allocated by ``reserve`` or, one at a time, by ``add``; allocation replaces the
    stacks' Parameters, so build optimisers and compiled graphs after it.

    Args:
        model: a causal language model of transformers; it is frozen.
        image_shape: (tokens, dim) of one image's features where the model reads images, for image prompts.
    """

    def __init__(self, model: nn.Module, image_shape: tuple[int, int] | None = None):
        self.model = model.requires_grad_(False)
        self.image_shape = image_shape
        self.routing = Routing()
        self.layers: dict[str, AdapterLayer] = {}
        self.inputs: dict[str, Any] = {}
        """Method -> the stack of a method that changes what the model reads."""
        self.entries: dict[str, Entry] = {}
        self._num_slots: dict[str, int] = {}
        self._sizes: dict[str, int] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    @property
    def names(self) -> list[str]:
        return list(self.entries)

    def reserve(self, method: str, num_slots: int, size: int = 0) -> None:
        """Makes room for ``num_slots`` adapters of a method, of up to ``size`` (rank, width, tokens), in every
        stack."""
        self._num_slots[method] = max(self._num_slots.get(method, 0), num_slots)
        self._sizes[method] = max(self._sizes.get(method, 0), size)
        for stack in self._stacks():
            if stack.method == method:
                stack.resize(self._num_slots[method], self._sizes[method])

    def add(self, name: str, config: AdapterConfig, seed: int = 0) -> Entry:
        """Opens a slot for a new adapter.

        The start depends on ``seed`` and the config alone, not on what else the bank holds.

        Raises:
            RefusedError: a name that is taken or cannot be a folder's, or targets that match nothing.
        """
        if not isinstance(name, str) or not NAME_PATTERN.fullmatch(name) or name == RESERVED_NAME:
            raise RefusedError(
                f"adapter name {name!r}: use 1 to 64 of A-Z a-z 0-9 . _ - and no leading dot; "
                f"{RESERVED_NAME!r} is the frozen model"
            )
        if name in self.entries:
            raise RefusedError(
                f"the bank already has an adapter {name!r}; remove it first or use another name"
            )
        parts = self.plan(config)
        generator = torch.Generator().manual_seed(seed)
        for part in parts:
            method = part.config.method
            self.reserve(method, max(part.slot + 1, self._num_slots.get(method, 0)), part.config.size)
            for path in part.sites:
                self._stack(path, part.config).open(part.slot, part.config, generator)
        self.entries[name] = Entry(config, parts)
        self.restrict(name, config)
        return self.entries[name]

    def restrict(self, name: str, config: AdapterConfig) -> None:
        """Keeps what ``config`` leaves alone from training: the queries of fused projections under IA3's "auto"."""
        for part, own in zip(self.entry(name).parts, config.parts(), strict=True):
            for path, stack, slot in self.places_of(part):
                if isinstance(stack, IA3Stack):
                    features = trained_features(self.model, path, own)
                    if features is not None:
                        stack.train_only(slot, features)

    def remove(self, name: str) -> None:
        """Empties the adapter's slots for the next one; the others keep theirs."""
        for _, stack, slot in self.places(name):
            stack.reset(slot)
        del self.entries[name]

    def entry(self, name: str) -> Entry:
        """Raises:
        UnknownNameError: the bank has no adapter of that name.
        """
        if name not in self.entries:
            raise UnknownNameError(f"no adapter {name!r}; the bank has {', '.join(self.entries) or 'none'}")
        return self.entries[name]

    def route(self, names: Sequence[str | None]) -> None:
        """Says which adapter serves each row of the coming forwards; None is the base model.

        Raises:
            UnknownNameError: an unknown name. It is never served by the base or by another adapter.
        """
        owned = [
            {} if name is None else {part.config.method: part.slot for part in self.entry(name).parts}
            for name in names
        ]
        slots: dict[str, Tensor] = {}
        uniform: dict[str, bool] = {}
        for method, num_slots in self._num_slots.items():
            rows = [own.get(method, BASE) for own in owned]
            slots[method] = torch.tensor(rows, dtype=torch.int64, device=self._device())
            uniform[method] = num_slots == 1 and all(row == 0 for row in rows)
        self.routing.write(slots, uniform)

    def stack(self, name: str, path: str) -> Stack:
        """The stack that holds tensors of ``name`` at ``path``; the first of several."""
        return next(stack for where, stack, _ in self.places(name) if where == path)

    def places(self, name: str) -> Iterator[Place]:
        """Every stack that holds tensors of an adapter."""
        for part in self.entry(name).parts:
            yield from self.places_of(part)

    def places_of(self, part: Part) -> Iterator[Place]:
        """Every stack that holds tensors of one method of an adapter."""
        for path in part.sites:
            yield Place(path, self._stack(path, part.config), part.slot)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Every tensor of an adapter, by ``<path of the layer>.<PEFT's name>``, or PEFT's name alone for what
        belongs to no layer."""
        return {
            key if path == INPUTS else f"{path}.{key}": tensor
            for path, stack, slot in self.places(name)
            for key, tensor in stack.tensors(slot).items()
        }

    def parameters(self) -> list[nn.Parameter]:
        """Every stack's Parameters, in the model's order: what an optimiser of adapters steps."""
        return [parameter for stack in self._stacks() for parameter in stack.parameters()]

    def state(self) -> list[torch.Tensor]:
        """Every tensor of every stack, scalings and the like included: what the answers of adapters depend on."""
        return [tensor for stack in self._stacks() for tensor in (*stack.parameters(), *stack.buffers())]

    def features(self, path: str, config: AdapterConfig) -> tuple[int, int]:
        """(in, out) features of the layer at ``path``, or of what the model reads, as ``config`` counts them."""
        if path != INPUTS:
            layer = self.layers.get(path)
            return (layer.in_features, layer.out_features) if layer else layer_features(self.model, path)
        return input_features(self.model, config, self.image_shape)

    def sites(self, config: AdapterConfig) -> list[str]:
        """Paths of what a method with this config changes."""
        return [INPUTS] if config.home == "inputs" else list(find_sites(self.model, config))

    def plan(self, config: AdapterConfig) -> list[Part]:
        """Slots and sites that a new adapter would get; nothing is changed.

        Raises:
            RefusedError: targets that match nothing, or parts that overlap.
        """
        parts: list[Part] = []
        for each in config.parts():
            sites = self.sites(each)
            for earlier in parts:
                if earlier.config.method == each.method and (both := set(sites) & set(earlier.sites)):
                    raise RefusedError(
                        f"two {each.method} parts of one adapter both change {min(both)}; give each its own layers"
                    )
            parts.append(Part(each, self._free_slot(each.method), sites))
            if each.home == "inputs":
                self.features(INPUTS, each)  # says now if this model has no such input
        return parts

    def _free_slot(self, method: str) -> int:
        taken = {
            part.slot
            for entry in self.entries.values()
            for part in entry.parts
            if part.config.method == method
        }
        return next(slot for slot in range(len(taken) + 1) if slot not in taken)

    def _stacks(self) -> Iterator[Stack]:
        for layer in self.layers.values():
            yield from layer.stacks.values()  # pyright: ignore[reportReturnType]
        yield from self.inputs.values()

    def _stack(self, path: str, config: AdapterConfig) -> Stack:
        """The stack for ``config``'s method at one place; made, and the layer wrapped, when missing."""
        if path == INPUTS:
            if config.method not in self.inputs:
                stack = self._new_stack(path, config)
                stack.attach(self.model.get_input_embeddings())  # pyright: ignore[reportCallIssue]
                self.inputs[config.method] = stack
                setattr(self.model, INPUTS, nn.ModuleDict(self.inputs))
            return self.inputs[config.method]
        layer = self.layers.get(path)
        if layer is None:
            layer = self.layers[path] = wrap_layer(self.model, path, self.routing)
        place = config.place(path)
        if place not in layer.stacks:
            layer.put(place, self._new_stack(path, config).train(layer.training))
        return layer.stacks[place]  # pyright: ignore[reportReturnType]

    def _new_stack(self, path: str, config: AdapterConfig) -> Stack:
        method = config.method
        sizes = self._num_slots[method], self._sizes[method]
        return config.make_stack(path, *self.features(path, config), *sizes).to(self._device())

    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

"""The adapter bank: which adapter sits in which slot of a model, and its injection into the model's layers."""

import re
from collections.abc import Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from mmpeft.adapters.entry import Entry, MethodPart, Place
from mmpeft.adapters.experts import AdaptedProjection
from mmpeft.adapters.functional import ALL_SERVED, BASE
from mmpeft.adapters.inputs import model_inputs
from mmpeft.adapters.invocation import invoked_tokens
from mmpeft.adapters.layer import AdaptedForward
from mmpeft.adapters.methods.base import AdapterConfig, ModelInputs
from mmpeft.adapters.methods.stack import Stack
from mmpeft.adapters.places import adapt_layer, make_stack, tensor_shapes
from mmpeft.adapters.routing import Routing
from mmpeft.adapters.targets import (
    find_sites,
    layer_features,
    require_reader,
    settle,
    tell_left_out,
    trained_features,
)
from mmpeft.errors import RefusedError
from mmpeft.names import RESERVED_NAME, unknown_finetune
from mmpeft.transfer import to_device

NAME_PATTERN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")
INPUTS = "adapter_inputs"
"""The path of what the model reads, where methods that change it have their stacks."""


class AdapterBank(nn.Module):
    """Adapters by name on one frozen model: the module that owns their stacks.

    The model is beside it, not in it: it keeps its tree and its state dict, and only the ``forward`` of adapted layers
    is replaced. `train` and `eval` reach both, since dropout of stacks belongs to the model's training; whatever else
    a module offers (``to``, ``zero_grad``, ``parameters``) is the stacks' alone.

    ``add`` adapts the layers it needs and opens a slot; ``route`` says which adapter serves each row of the
    next forward. Slots are allocated by ``reserve`` or, one at a time, by ``add``; allocation replaces the
    stacks' Parameters, so build optimisers and compiled graphs after it.

    Args:
        model: a causal language model of transformers; it is frozen.
        image_shape: (tokens, dim) of one image's features where the model reads images, for image prompts; None tokens
            where their number depends on the image.
    """

    def __init__(self, model: nn.Module, image_shape: tuple[int | None, int] | None = None):
        super().__init__()
        self._model = [model.requires_grad_(False)]  # in a list: it is no child of this module
        self.image_shape = image_shape
        self.routing = Routing()
        self.stacks: Any = nn.ModuleDict()
        """Every stack by path and place, with slashes for dots."""
        self.layers: dict[str, AdaptedForward | AdaptedProjection] = {}
        self.inputs: dict[str, Stack] = {}
        """Method -> the stack of a method that changes what the model reads, in the order in which they act."""
        self.entries: dict[str, Entry] = {}
        self.doubling = False
        """Whether `add`, where it has to make room, makes it for twice as many: where adapters come and go."""
        self._inputs: ModelInputs | None = None
        self._num_slots: dict[str, int] = {}
        self._sizes: dict[str, int] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    @property
    def model(self) -> Any:
        """The frozen model."""
        return self._model[0]

    @property
    def names(self) -> list[str]:
        return list(self.entries)

    def reserve(self, method: str, num_slots: int, size: int = 0) -> None:
        """Makes room for ``num_slots`` adapters of a method, of up to ``size`` (rank, width, tokens), in every
        stack."""
        self._num_slots[method] = max(self._num_slots.get(method, 0), num_slots)
        self._sizes[method] = max(self._sizes.get(method, 0), size)
        for stack in self.stacks.values():
            if stack.method == method:
                stack.resize(self._num_slots[method], self._sizes[method])

    def train(self, mode: bool = True) -> Self:
        """Puts the stacks and the model into training mode, or both into evaluation mode."""
        self.model.train(mode)
        return super().train(mode)

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
        tell_left_out(self.model, name, config)
        for part in parts:
            method = part.config.method
            room = self._num_slots.get(method, 0)
            if part.slot >= room:
                room = max(2, 2 * room) if self.doubling else part.slot + 1
            self.reserve(method, room, part.config.size)
            for path in part.sites:
                self._stack(path, part.config).open(part.slot, part.config, generator)
        self.entries[name] = Entry(config, parts)
        self.restrict(name, config)
        return self.entries[name]

    def restrict(self, name: str, config: AdapterConfig) -> None:
        """Keeps what ``config`` leaves alone from training: the queries of fused projections under IA3's "auto"."""
        for part, own in zip(self.entry(name).parts, config.parts(), strict=True):
            for path, stack, slot in self.places_of(part):
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
            raise unknown_finetune(name, self.entries)
        return self.entries[name]

    def route(self, names: Sequence[str | None], ids: Tensor | None = None) -> None:
        """Says which adapter serves each row of the coming forwards; None is the base model. Dropout draws from torch's
        global generator, unless `Routing.seed_dropout` follows.

        Args:
            names: of the rows' adapters.
            ids: (rows, tokens) that a plain forward reads, where activated adapters look for their invocation tokens.

        Raises:
            UnknownNameError: an unknown name. It is never served by the base or by another adapter.
            RefusedError: nobody reads what an adapter gives the model to read, see `require_reader`.
        """
        owned = [
            {} if name is None else {part.config.method: part.slot for part in self.entry(name).parts}
            for name in names
        ]
        for name in {name for name in names if name is not None}:
            require_reader(self.entry(name).config.parts(), self.image_shape)
        slots: dict[str, Tensor] = {}
        uniform: dict[str, bool] = {}
        for method, num_slots in self._num_slots.items():
            rows = [own.get(method, BASE) for own in owned]
            slots[method] = to_device(rows, self._device())
            setattr(slots[method], ALL_SERVED, BASE not in rows)
            uniform[method] = num_slots == 1 and all(row == 0 for row in rows)
        self.routing.slots, self.routing.uniform = slots, uniform
        self.routing.names, self.routing.owned, self.routing.streams = list(names), owned, []
        self.routing.gathered, self.routing.few = None, {}
        invocations = self.invocations(names)
        acts: Tensor | None = None
        if any(invocations) and ids is not None:
            acts = to_device(invoked_tokens(ids.tolist(), invocations), ids.device, torch.bool)
        self.routing.act_on(acts)
        self.routing.awaits_invoked = any(invocations) and ids is None

    def invocations(self, names: Sequence[str | None]) -> list[Sequence[int]]:
        """The invocation tokens of every row's adapter; empty for rows whose adapter acts on all tokens."""
        return [() if name is None else self.entry(name).invocation for name in names]

    def places(self, name: str) -> Iterator[Place]:
        """Every stack that holds tensors of an adapter."""
        for part in self.entry(name).parts:
            yield from self.places_of(part)

    def places_of(self, part: MethodPart) -> Iterator[Place]:
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

    def fill(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Copies tensors named as `tensors` returns them into an adapter."""
        for path, stack, slot in self.places(name):
            prefix = "" if path == INPUTS else f"{path}."
            stack.fill(slot, {key: tensors[prefix + key] for key in stack.tensors(slot)})

    def state(self) -> list[torch.Tensor]:
        """Every tensor of every stack, scalings and the like included: what the answers of adapters depend on."""
        return [*self.parameters(), *self.buffers()]

    def features(self, path: str, config: AdapterConfig) -> tuple[int, int]:
        """(in, out) features of the layer at ``path``, or of what the model reads, as ``config`` counts them."""
        if path == INPUTS:
            return config.input_features(self.model_inputs())
        return layer_features(self.model, path)

    def shapes(self, path: str, config: AdapterConfig) -> dict[str, list[int]]:
        """Name -> shape of the tensors of a slot of this config at ``path``."""
        if path == INPUTS:
            return config.shapes(path, *self.features(path, config))
        return tensor_shapes(self.model, path, config)

    def model_inputs(self) -> ModelInputs:
        """The sizes of what the model reads."""
        if self._inputs is None:
            self._inputs = model_inputs(self.model, self.image_shape)
        return self._inputs

    def sites(self, config: AdapterConfig) -> list[str]:
        """Paths of what a method with this config changes."""
        return [INPUTS] if config.home == "inputs" else list(find_sites(self.model, config))

    def plan(self, config: AdapterConfig) -> list[MethodPart]:
        """Slots and sites that a new adapter would get; nothing is changed.

        Raises:
            RefusedError: targets that match nothing, or parts that overlap.
        """
        parts: list[MethodPart] = []
        for each in config.parts():
            sites = self.sites(each)
            for earlier in parts:
                if earlier.config.method == each.method and (both := set(sites) & set(earlier.sites)):
                    raise RefusedError(
                        f"two {each.method} parts of one adapter both change {min(both)}; give each its own layers"
                    )
                if earlier.config.invocation and each.invocation:
                    raise RefusedError(
                        f"two {each.method} parts of one adapter; give it one, with one list of invocation tokens"
                    )
            parts.append(MethodPart(settle(self.model, each), self._free_slot(each.method), sites))
            if each.home == "inputs":
                self.features(INPUTS, each)  # says now if this model has no such input
        return parts

    def _free_slot(self, method: str) -> int:
        parts = (
            part for entry in [*self.entries.values()] for part in entry.parts
        )  # others may add meanwhile
        taken = {part.slot for part in parts if part.config.method == method}
        return next(slot for slot in range(len(taken) + 1) if slot not in taken)

    def _stack(self, path: str, config: AdapterConfig) -> Stack:
        """The stack for ``config``'s method at one place; made, and the layer adapted, when missing."""
        place = config.method if path == INPUTS else config.place(path)
        key = f"{path}/{place}".replace(".", "/")  # a module's name has no dots; none with a slash is taken
        if key not in self.stacks:
            stack = self.stacks[key] = self._new_stack(path, config)
            if path == INPUTS:
                self._put_input(stack)
            else:
                layer = self._layer(path)
                stack.train(layer.base.training if self.routing.base_says_mode else self.training)
                layer.put(place, stack)
        return self.stacks[key]

    def _put_input(self, stack: Stack) -> None:
        embedding = self.model.get_input_embeddings()
        stack.attach(embedding, embedding.forward)
        self.inputs[stack.method] = stack
        self.inputs = dict(sorted(self.inputs.items(), key=lambda item: (item[1].turn, item[0])))

    def _layer(self, path: str) -> AdaptedForward | AdaptedProjection:
        if path not in self.layers:
            self.layers[path] = adapt_layer(self.model, path, self.routing)
        return self.layers[path]

    def _new_stack(self, path: str, config: AdapterConfig) -> Stack:
        method = config.method
        sizes = self._num_slots[method], self._sizes[method]
        if path == INPUTS:
            return config.make_stack(path, *self.features(path, config), *sizes).to(self._device())
        return make_stack(self.model, path, config, *sizes).to(self._device())

    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

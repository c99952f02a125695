"""The bank: which adapter sits in which slot of a model, and the one place that puts it there."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmpeft.adapters.functional import BASE
from mmpeft.adapters.ia3 import IA3Config, IA3Stack
from mmpeft.adapters.inject import wrap_linear
from mmpeft.adapters.linear import AdapterLinear, Routing
from mmpeft.adapters.lora import LoraConfig, LoraStack
from mmpeft.adapters.sites import find_sites, is_feedforward
from mmpeft.adapters.stack import AdapterConfig

NAME_PATTERN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")
RESERVED_NAME = "base"
"""What people call the frozen model where they choose among adapters."""
METHODS = (LoraConfig.method, IA3Config.method)


@dataclass
class Entry:
    """One adapter of a bank."""

    config: AdapterConfig
    slot: int
    sites: list[str]
    """Paths of the linears that it changes."""


class AdapterBank:
    """Adapters by name on one frozen model.

    ``add`` wraps the linears it needs and opens a slot; ``route`` says which adapter serves each row of the
    next forward. Slots are allocated by ``reserve`` or, one at a time, by ``add``; allocation replaces the
    stacks' Parameters, so build optimisers and compiled graphs after it.
    """

    def __init__(self, model: nn.Module):
        self.model = model.requires_grad_(False)
        self.routing = Routing()
        self.layers: dict[str, AdapterLinear] = {}
        self.entries: dict[str, Entry] = {}
        self._num_slots = dict.fromkeys(METHODS, 0)
        self._max_rank = 0

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    @property
    def names(self) -> list[str]:
        return list(self.entries)

    def reserve(self, method: str, num_slots: int, rank: int = 0) -> None:
        """Makes room for ``num_slots`` adapters of a method, of up to ``rank`` for LoRA, in every stack."""
        self._num_slots[method] = max(self._num_slots[method], num_slots)
        self._max_rank = max(self._max_rank, rank)
        for layer in self.layers.values():
            for stack in layer.stacks():
                if stack.method == method:
                    stack.resize(self._num_slots[method], self._max_rank)

    def add(self, name: str, config: AdapterConfig, seed: int = 0) -> Entry:
        """Opens a slot for a new adapter, which starts as the base model.

        The start depends on ``seed`` and the config alone, not on what else the bank holds.

        Raises:
            ValueError: a name that is taken or cannot be a folder's, or targets that match nothing.
        """
        if not isinstance(name, str) or not NAME_PATTERN.fullmatch(name) or name == RESERVED_NAME:
            raise ValueError(
                f"adapter name {name!r}: use 1 to 64 of A-Z a-z 0-9 . _ - and no leading dot; "
                f"{RESERVED_NAME!r} is the frozen model"
            )
        if name in self.entries:
            raise ValueError(f"the bank already has an adapter {name!r}; remove it first or use another name")
        sites = find_sites(self.model, config)
        slot = self._free_slot(config.method)
        rank = config.rank if isinstance(config, LoraConfig) else 0
        self.reserve(config.method, max(slot + 1, self._num_slots[config.method]), rank)
        generator = torch.Generator().manual_seed(seed)
        for path in sites:
            self._stack(path, config).open(slot, config, generator)  # pyright: ignore[reportArgumentType]
        self.entries[name] = Entry(config, slot, list(sites))
        return self.entries[name]

    def remove(self, name: str) -> None:
        """Empties the adapter's slot for the next one; the others keep theirs."""
        entry = self.entry(name)
        for path in entry.sites:
            self._stack(path, entry.config).reset(entry.slot)
        del self.entries[name]

    def entry(self, name: str) -> Entry:
        """Raises:
        KeyError: the bank has no adapter of that name.
        """
        if name not in self.entries:
            raise KeyError(f"no adapter {name!r}; the bank has {', '.join(self.entries) or 'none'}")
        return self.entries[name]

    def route(self, names: Sequence[str | None]) -> None:
        """Says which adapter serves each row of the coming forwards; None is the base model.

        Raises:
            KeyError: an unknown name. It is never served by the base or by another adapter.
        """
        entries = [None if name is None else self.entry(name) for name in names]
        slots: dict[str, Tensor] = {}
        uniform: dict[str, bool] = {}
        for method in METHODS:
            rows = [e.slot if e and e.config.method == method else BASE for e in entries]
            slots[method] = torch.tensor(rows, dtype=torch.int64, device=self._device())
            uniform[method] = self._num_slots[method] == 1 and all(row == 0 for row in rows)
        self.routing.write(slots, uniform)

    def stack(self, name: str, path: str) -> LoraStack | IA3Stack:
        """The stack that holds ``name``'s tensors on the linear at ``path``."""
        return self._stack(path, self.entry(name).config)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Every tensor of an adapter, by ``<path of the linear>.<PEFT's name>``."""
        entry = self.entry(name)
        return {
            f"{path}.{key}": tensor
            for path in entry.sites
            for key, tensor in self._stack(path, entry.config).tensors(entry.slot).items()
        }

    def parameters(self) -> list[nn.Parameter]:
        """Every stack's Parameters, in the model's order: what an optimiser of adapters steps."""
        return [p for layer in self.layers.values() for stack in layer.stacks() for p in stack.parameters()]

    def _free_slot(self, method: str) -> int:
        taken = {entry.slot for entry in self.entries.values() if entry.config.method == method}
        return next(slot for slot in range(len(taken) + 1) if slot not in taken)

    def _stack(self, path: str, config: AdapterConfig) -> LoraStack | IA3Stack:
        """The stack for ``config``'s method on one linear; made, and the linear wrapped, when missing."""
        layer = self.layers.get(path)
        if layer is None:
            layer = self.layers[path] = wrap_linear(self.model, path, self.routing)
        num_slots = self._num_slots[config.method]
        if isinstance(config, IA3Config):
            side = "input" if is_feedforward(path, config) else "output"
            stack = layer.ia3_input if side == "input" else layer.ia3_output
            if stack is None:
                features = layer.in_features if side == "input" else layer.out_features
                stack = IA3Stack(features, side, num_slots).to(self._device())
                setattr(layer, f"ia3_{side}", stack)
            return stack
        if layer.lora is None:
            layer.lora = LoraStack(layer.in_features, layer.out_features, num_slots, self._max_rank)
            layer.lora.to(self._device()).train(layer.training)
        return layer.lora

    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

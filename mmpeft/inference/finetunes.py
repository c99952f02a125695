"""Finetunes of a live engine: loaded, replaced and unloaded while others are asked.

A name is what callers say, a version what a request gets: it keeps the version that it was taken in with to its end,
whatever the name means by then. A version leaves the bank when it has been replaced or unloaded and its last request
has ended.
"""

from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any

import torch

from mmpeft.adapters.entry import Entry
from mmpeft.adapters.methods.stack import Stack
from mmpeft.adapters.peft_format import ReadAdapter, add_adapter, read_adapter
from mmpeft.errors import RefusedError
from mmpeft.hashing import hash_json, hash_tensors
from mmpeft.inference.adapter_check import check_adapters, kind_of
from mmpeft.inference.reuse import Identity
from mmpeft.models.multimodal import MultimodalModel
from mmpeft.names import RESERVED_NAME, unknown_finetune
from mmpeft.runs.files import read_projector
from mmpeft.runs.layout import PROJECTOR


@dataclass
class ReadFinetune:
    """A finetune that fits, and is in no slot yet."""

    adapter: ReadAdapter
    projector: dict[str, torch.Tensor] | None
    """Its own; None where it is that of the base."""


@dataclass(eq=False)
class Version:
    """What a name meant when a request came."""

    name: str | None
    """Of the finetune; None is the base."""
    in_bank: str | None
    """What the bank calls it."""
    pins: int = 0
    """Requests that hold it."""
    identity: Identity | None = None
    """As soon as it was asked for."""


class Finetunes:
    """Names -> versions. Whoever puts or clears must be the only one who uses the model meanwhile; names may be looked
    up and pinned from any thread.

    Args:
        model: whose bank's finetunes are there from the beginning, and have been checked.
        base: hash of the frozen base, where there are several.
    """

    def __init__(self, model: MultimodalModel, base: str = ""):
        self.model = model
        self._lock = RLock()
        self._hashes = base, hash_json(model.vision_encoder.fingerprint)
        self._base = Version(None, None)
        self._versions = {name: Version(name, name) for name in model.bank.names}
        self._leaving: list[Version] = []
        kinds = {kind_of(entry) for entry in model.bank.entries.values()}
        self._checked: dict[str, Any] = {"adapters": sorted(kinds)}

    def names(self) -> list[str]:
        """Of the finetunes that can be asked."""
        with self._lock:
            return list(self._versions)

    def pin(self, name: str | None) -> Version:
        """The version of now, which stays until `unpin`.

        Raises:
            UnknownNameError: there is none of that name.
        """
        with self._lock:
            if name is not None and name not in self._versions:
                raise unknown_finetune(name, [*self._versions, RESERVED_NAME])
            version = self._base if name is None else self._versions[name]
            version.pins += 1
            return version

    def unpin(self, version: Version) -> None:
        """A request has ended."""
        with self._lock:
            version.pins -= 1

    def read(self, folder: str | Path) -> "ReadFinetune":
        """A finetune in PEFT's format, with its projector if there is one beside it. Others may use the model then.

        Raises:
            RefusedError: as `read_adapter` refuses it.
        """
        path = Path(folder) / PROJECTOR
        projector = read_projector(path) if path.exists() else None
        if projector is not None and hash_tensors(projector) == hash_tensors(self.model.projector.tensors()):
            projector = None
        return ReadFinetune(read_adapter(self.model.bank, folder, untrained=projector is not None), projector)

    def put(self, name: str, finetune: "ReadFinetune") -> None:
        """Adds it, or puts it in the place of the one of that name.

        Raises:
            RefusedError: as `check_adapters` refuses it; nothing is changed then.
        """
        bank, in_bank = self.model.bank, self._free_name(name)
        bank.doubling = True
        add_adapter(bank, in_bank, finetune.adapter)
        try:
            self._checked = check_adapters(self.model, self._checked, among=[in_bank])
            if finetune.projector is not None:
                self._put_projector(in_bank, finetune.projector)
        except RefusedError:
            bank.remove(in_bank)
            raise
        with self._lock:
            self._retire(self._versions.pop(name, None))
            self._versions[name] = Version(name, in_bank)

    def unload(self, name: str) -> None:
        """Raises:
        UnknownNameError: there is none of that name.
        """
        with self._lock:
            if name not in self._versions:
                raise unknown_finetune(name, self._versions)
            self._retire(self._versions.pop(name))

    def clear(self) -> bool:
        """Takes out of the bank what nobody holds any more; whether there was anything."""
        with self._lock:
            gone = [version for version in self._leaving if not version.pins]
            self._leaving = [version for version in self._leaving if version.pins]
        for version in gone:
            self.model.bank.remove(str(version.in_bank))
            self.model.projector_slots.pop(str(version.in_bank), None)
        return bool(gone)

    @property
    def has_leaving(self) -> bool:
        """Whether `clear` would do something."""
        with self._lock:
            return any(not version.pins for version in self._leaving)

    def fix_shapes(self) -> None:
        """Room for more than one of everything: what serves a single one computes in another way."""
        for method in {
            part.config.method for entry in self.model.bank.entries.values() for part in entry.parts
        }:
            self.model.bank.reserve(method, 2)
        self.model.projector.reserve(2)

    def identify(self, version: Version) -> Identity:
        """The hashes of what answers a version's rows; computed when they are first asked for."""
        if version.identity is None:
            version.identity = self._identity(version.in_bank)
        return version.identity

    def _identity(self, in_bank: str | None) -> Identity:
        model, (base, encoder) = self.model, self._hashes
        projector = hash_tensors(model.projector.tensors(model.projector_slots.get(in_bank or "", 0)))
        if in_bank is None:
            return Identity(base, encoder, "", projector, False, False)
        entry = model.bank.entry(in_bank)
        adapter = hash_json([repr(entry.config), hash_tensors(model.bank.tensors(in_bank))])
        activated = all(part.config.invocation for part in entry.parts)
        return Identity(base, encoder, adapter, projector, self._changes_images(entry), activated)

    def _changes_images(self, entry: Entry) -> bool:
        inputs: dict[str, Stack] = self.model.bank.inputs
        return any(
            part.config.method in inputs and inputs[part.config.method].of_images for part in entry.parts
        )

    def _put_projector(self, in_bank: str, tensors: dict[str, torch.Tensor]) -> None:
        projector, slots = self.model.projector, self.model.projector_slots
        taken = {0, *slots.values()}
        slot = next(slot for slot in range(len(taken) + 1) if slot not in taken)
        if slot >= len(projector.weight):
            projector.reserve(2 * len(projector.weight))
        projector.fill(tensors, slot)
        slots[in_bank] = slot

    def _retire(self, version: Version | None) -> None:
        if version is not None:
            self._leaving.append(version)

    def _free_name(self, name: str) -> str:
        """A name for the bank: its own, or one with a number where a version of before still has that."""
        others = (f"{name[:50]}.{number}" for number in range(len(self.model.bank.names) + 1))
        return next(each for each in (name, *others) if each not in self.model.bank)

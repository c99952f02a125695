"""Finetunes of a live engine: loaded, replaced and unloaded while others are asked.

A name is what callers say, a version what a request gets: it keeps the version that it was taken in with to its end,
whatever the name means by then. A version leaves the bank when it has been replaced or unloaded and its last request
has ended.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from threading import RLock

from mmpeft.adapters.peft_format import load_adapter
from mmpeft.errors import RefusedError
from mmpeft.inference.adapter_check import check_adapters
from mmpeft.models.multimodal import MultimodalModel
from mmpeft.names import RESERVED_NAME, unknown_finetune


@dataclass(eq=False)
class Version:
    """What a name meant when a request came."""

    name: str | None
    """Of the finetune; None is the base."""
    number: int
    """Counts the versions of the engine."""
    in_bank: str | None
    """What the bank calls it."""
    pins: int = 0
    """Requests that hold it."""
    retired: bool = False
    """Whether no more requests get it."""


class Finetunes:
    """Names -> versions. Whoever loads or clears must be the only one who uses the model meanwhile; names may be looked
    up and pinned from any thread.

    Args:
        model: whose bank's finetunes are there from the beginning.
    """

    def __init__(self, model: MultimodalModel):
        self.model = model
        self._lock = RLock()
        self._count = 0
        self._base = Version(None, 0, None)
        self._versions = {name: self._version(name, name) for name in model.bank.names}
        self._leaving: list[Version] = []
        self._checked: dict[str, object] = {}

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
            if name is None:
                return self._base
            if name not in self._versions:
                raise unknown_finetune(name, [*self._versions, RESERVED_NAME])
            self._versions[name].pins += 1
            return self._versions[name]

    def unpin(self, version: Version) -> None:
        """A request has ended."""
        with self._lock:
            if version is not self._base:
                version.pins -= 1

    def load(self, name: str, folder: str | Path) -> None:
        """Adds a finetune in PEFT's format, or puts it in the place of the one of that name.

        Raises:
            RefusedError: as `load_adapter` and `check_adapters` refuse it; nothing is changed then.
        """
        in_bank = self._free_name(name)
        load_adapter(self.model.bank, in_bank, folder)
        left_out: dict[str, RefusedError] = {}
        check_adapters(self.model, self._checked, left_out)
        if in_bank in left_out:
            raise left_out[in_bank]
        with self._lock:
            self._retire(self._versions.pop(name, None))
            self._versions[name] = self._version(name, in_bank)

    def unload(self, name: str) -> None:
        """Raises:
        UnknownNameError: there is none of that name.
        """
        with self._lock:
            if name not in self._versions:
                raise unknown_finetune(name, self._versions)
            self._retire(self._versions.pop(name))

    def clear(self) -> None:
        """Takes out of the bank what nobody holds any more."""
        with self._lock:
            gone = [version for version in self._leaving if not version.pins]
            self._leaving = [version for version in self._leaving if version.pins]
        for version in gone:
            self.model.bank.remove(str(version.in_bank))

    def _retire(self, version: Version | None) -> None:
        if version is not None:
            version.retired = True
            self._leaving.append(version)

    def _version(self, name: str, in_bank: str) -> Version:
        self._count += 1
        return Version(name, self._count, in_bank)

    def _free_name(self, name: str) -> str:
        """A name for the bank: its own, or with a number where a version of before still has that."""
        taken: Iterable[str] = self.model.bank.names
        return next(
            n for n in (name, *(f"{name[:50]}.{k}" for k in range(len(self._leaving) + 2))) if n not in taken
        )

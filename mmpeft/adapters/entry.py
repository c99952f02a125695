"""What a bank knows of one adapter: its config, its slots and where its tensors are."""

from dataclasses import dataclass
from typing import NamedTuple

from mmpeft.adapters.methods.base import AdapterConfig
from mmpeft.adapters.methods.stack import Stack


@dataclass
class MethodPart:
    """One method of an adapter."""

    config: AdapterConfig
    slot: int
    sites: list[str]
    """Paths of the layers that it changes; `INPUTS` for methods that change what the model reads."""


@dataclass
class Entry:
    """One adapter of a bank."""

    config: AdapterConfig
    parts: list[MethodPart]

    @property
    def sites(self) -> list[str]:
        """Paths of everything that the adapter changes."""
        return list(dict.fromkeys(path for part in self.parts for path in part.sites))


class Place(NamedTuple):
    """Where an adapter keeps some of its tensors."""

    path: str
    stack: Stack
    slot: int

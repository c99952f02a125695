"""What a bank knows of one adapter: its config, its slots and where its tensors are."""

from collections.abc import Sequence
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

    @property
    def invocation(self) -> Sequence[int]:
        """The ids of tokens from whose last occurrence on some part of it acts; empty where all act everywhere."""
        return next((part.config.invocation for part in self.parts if part.config.invocation), ())


class Place(NamedTuple):
    """Where an adapter keeps some of its tensors."""

    path: str
    stack: Stack
    slot: int

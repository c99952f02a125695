"""The settings of the feature cache: where it lies, how large it may become, and when it is filled."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mmpeft.errors import RefusedError
from mmpeft.paths import home

KEYS = "image_keys.sqlite"
"""In the folder: the keys of image files."""


@dataclass
class CacheConfig:
    """Where features of images are kept, how much of the disk they may take, and when they are written.

    Raises:
        RefusedError: ``max_gb`` is no number above 0.
    """

    folder: str | None = None
    """Folder of the features of all encoders; None is `features` in the mmpeft home."""
    max_gb: float | None = None
    """Most that the folder may hold, in 10^9 bytes; None lets it grow by a tenth of what is free on its disk."""
    build: Literal["auto", "always", "never"] = "auto"
    """When features are written: "auto" where they are seen twice or more and fit, "always" where they fit, "never"
    only reads those that are there. What is not written is encoded in the step that needs it."""

    def __post_init__(self):
        if self.max_gb is not None and not self.max_gb > 0:
            raise RefusedError(
                f"cache.max_gb is {self.max_gb}; it must be above 0. To write no features, set cache.build to never"
            )

    @property
    def path(self) -> Path:
        return Path(self.folder) if self.folder else home() / "features"


def cache_config(setting: "str | CacheConfig | None") -> CacheConfig:
    """The setting ``data.cache``: a section, or a folder alone."""
    return setting if isinstance(setting, CacheConfig) else CacheConfig(folder=setting or None)

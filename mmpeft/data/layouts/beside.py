"""What records took from the disk beside the data files: a store of them is right for as long as that is as it was."""

import os
from typing import Any

from mmpeft.files import version_if_there

KEPT = 300_000
"""Links, folders and files that are looked at again at every start; with more of them the rows are read again."""


class Beside:
    """Grows as rows are read."""

    def __init__(self) -> None:
        self._leads_to: dict[str, str] = {}
        """Every folder of images, and every image that is a link -> its real path."""
        self._versions: dict[str, list[int] | None] = {}
        """Videos whose frames were counted, and folders that were searched for a name -> their version."""
        self._may_change = False

    def leads(self, path: str, real: str) -> None:
        """A link or folder was followed."""
        self._leads_to[path] = real
        self._limit()

    def looked_into(self, path: str) -> None:
        """More than its being there was taken from a file, or from a folder's list of names."""
        if path not in self._versions:
            self._versions[path] = version_if_there(path)
            self._limit()

    def is_open(self) -> None:
        """Something is not there yet: what it means can change, and rows must be read again."""
        self._may_change = True

    @property
    def told(self) -> dict[str, Any] | None:
        """As JSON holds it; None where rows must be read again at every start."""
        return None if self._may_change else {"leads to": self._leads_to, "versions": self._versions}

    def _limit(self) -> None:
        if len(self._leads_to) + len(self._versions) > KEPT:
            self._leads_to, self._versions = {}, {}
            self.is_open()


def is_still(told: dict[str, Any] | None) -> bool:
    """Whether all that was told of an earlier reading is as it was."""
    return (
        told is not None
        and all(os.path.realpath(path) == real for path, real in told["leads to"].items())
        and all(version_if_there(path) == version for path, version in told["versions"].items())
    )

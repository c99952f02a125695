"""What every list of images gives: a name, how the image is read, and what tells whether it has changed."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

from mmpeft.data.images import image_file
from mmpeft.data.sequences import Lazy
from mmpeft.files import version_if_there


@dataclass(frozen=True)
class Listed:
    """One image of a list."""

    name: str
    read: Callable[[], str | bytes]
    """Its path, or its encoded bytes; raises `RefusedError` where there are none."""
    version: Callable[[], Any]
    """What tells it, without reading it, from any other in its place; None where nothing is there."""
    id: str | None = None
    """What a table calls its row."""
    is_video: bool = False
    """Whether it is a video, which is read as its path, and of which frames are to be seen."""


class Part(Lazy[Listed]):
    """Images that are read in the same way."""

    names: Sequence[str]
    num_videos = 0
    """How many of them are videos."""

    @property
    def ids(self) -> Iterable[str | None]:
        """What a table calls its rows."""
        return repeat(None)

    def __len__(self) -> int:
        return len(self.names)


def version_of(path: str) -> list[int] | None:
    """Of an image's file; None where there is none."""
    return version_if_there(image_file(path))

"""Files of several frames, pages or slices: which one is taken, and that this is said."""

import sys
from typing import Literal

from mmpeft.data.images.source import ImageError

MOST_TOLD = 20
"""Files of several frames that are named; of a folder of animations nobody reads a million lines."""


class FrameNotes:
    """Says once of each file which of its frames was taken; after `MOST_TOLD` files that no more are named."""

    def __init__(self):
        self.told: set[str] = set()

    def tell(self, source: str, taken: int, of: str = "several frames") -> None:
        """Args:
        of: how many there are, in words.
        """
        if source in self.told or len(self.told) >= MOST_TOLD:
            return
        self.told.add(source)
        file = source.strip("'")
        print(
            f"{source} has {of}: frame {taken} is taken; name another as {file}#frame=1, counted from 0",
            file=sys.stderr,
        )
        if len(self.told) == MOST_TOLD:
            print("further files of several frames are not named", file=sys.stderr)


NOTES = FrameNotes()


def choose_frame(
    named: int | None, count: int, default: Literal["first", "middle"], source: str, what: str = "frames"
) -> int:
    """The number of the frame to take, from 0.

    Args:
        named: as the image's name says it.
        count: how many there are.
        default: which, where the name does not say.

    Raises:
        ImageError: the file has no such frame.
    """
    if named is not None:
        if named >= count:
            raise no_such_frame(named, count, what)
        return named
    frame = 0 if default == "first" else count // 2
    if count > 1:
        NOTES.tell(source, frame, f"{count:,} {what}")
    return frame


def no_such_frame(named: int, count: int, what: str = "frames") -> ImageError:
    return ImageError(f"frame {named} was asked for; there are {count:,} {what}, 0 to {count - 1}")

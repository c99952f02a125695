"""Images and videos that are files: of a folder and of the folders in it, or named one by one."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from mmpeft.data.image_lists.base import Listed, Part, version_of
from mmpeft.data.images.formats import is_video_file


class Files(Part):
    """Files below a folder.

    Args:
        folder: that the names are relative to.
        names: of the files.
    """

    def __init__(self, folder: str, names: Sequence[str]):
        self.folder, self.names = folder, names
        self._videos = {name for name in names if is_video_file(os.path.join(folder, name))}
        self.num_videos = len(self._videos)

    def item(self, number: int) -> Listed:
        path = os.path.join(self.folder, self.names[number])
        is_video = self.names[number] in self._videos
        return Listed(self.names[number], lambda: path, lambda: version_of(path), is_video=is_video)


def walk(folder: str, left: Counter[str], is_wanted: Callable[[str], bool]) -> Iterator[str]:
    """Names relative to a folder of the files below it that are wanted; the others are counted."""

    def fail(error: OSError) -> None:
        raise error  # by default, os.walk passes over a folder that it cannot read

    for parent, _, names in os.walk(folder, onerror=fail):
        within = os.path.relpath(parent, folder)
        for name in names:
            if is_wanted(os.path.join(parent, name)):
                yield os.path.normpath(os.path.join(within, name))
            else:
                left[os.path.splitext(name)[1].lower()] += 1

"""What the inputs of captioning stand for: folders, globs, single files, tables and tars."""

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

from mmpeft.data.formats.streams import ending
from mmpeft.data.hash_set import HashSet
from mmpeft.data.image_lists.base import Listed, Part
from mmpeft.data.image_lists.folders import Files, walk
from mmpeft.data.image_lists.tables import Table
from mmpeft.data.image_lists.tars import Tar
from mmpeft.data.images import is_image_file
from mmpeft.data.images.formats import is_video_file
from mmpeft.data.sequences import Chained
from mmpeft.errors import MissingFileError, RefusedError
from mmpeft.hashing import hash_rows

TAR = ".tar"
TABLES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".arrow")
"""Endings of files that a glob names as tables; any other file is one only where it is named itself."""
BEHIND_A_FILE = re.compile(r"[:+]")
"""What stands between a file and its split, or the file that belongs to it."""


class ImageList(Chained[Listed]):
    """The images and videos of some inputs.

    Args:
        parts: of folders and single files, of each tar, of each table.
        left: files that are no images, by their endings.
        repeated: rows of tables whose image an earlier row has; they are not among the images.
    """

    def __init__(self, parts: Sequence[Part], left: Counter[str], repeated: int = 0):
        super().__init__(parts)
        self.left, self.repeated = left, repeated
        self._named = parts
        self.num_videos = sum(part.num_videos for part in parts)

    @property
    def names(self) -> Iterator[str]:
        return chain.from_iterable(part.names for part in self._named)

    def hash(self) -> str:
        """Identity of the list: the names and ids in their order."""
        return hash_rows(row for part in self._named for row in zip(part.names, part.ids, strict=False))


def find_images(inputs: Sequence[str], videos: bool = True, output: str | None = None) -> ImageList:
    """The images and videos of folders and of those in them, of globs, single files, tables and tars.

    The names are relative to the input where it is the only one and no glob, else as the inputs are given. Links to
    folders are not followed.

    Args:
        inputs: as they are given, at least one.
        videos: whether those are wanted; else they are files that are no images. In tars they always are.
        output: file that is made of them. It, and what lies beside it under its name and an ending more, is nothing
            that a glob can mean.

    Raises:
        RefusedError: an input is not there or cannot be read, no image is found, or one is given twice.
    """
    if not inputs:
        raise RefusedError("no input is named; name a folder of images, images, tables or tars")
    found, left = _Found(len(inputs) == 1, videos, output), Counter[str]()
    for given in inputs:
        found.add(given, left)
    base, files = found.files
    parts: list[Part] = [Files(base, sorted(files))] if files else []
    parts += [Tar(path, prefix, left) for path, prefix in sorted(found.tars)]
    tables = [Table(path, prefix, videos) for path, prefix in sorted(found.tables)]
    images = ImageList([*parts, *tables], left, sum(table.repeated for table in tables))
    if not len(images):
        raise RefusedError(f"{', '.join(inputs)} holds no images" + (f"; {left_out(left)}" if left else ""))
    seen = HashSet()
    if twice := next((name for name in images.names if not seen.add(hash(name))), None):
        raise RefusedError(f"the image {twice!r} is given twice; name each input once")
    return images


class _Found:
    """What inputs stand for, before tars and tables are opened."""

    def __init__(self, alone: bool, videos: bool, output: str | None):
        self.alone, self.videos = alone, videos
        self._output = None if output is None else os.path.realpath(output)
        self.files: tuple[str, list[str]] = "", []
        """The folder that they are relative to, and their names."""
        self.tars: list[tuple[str, str]] = []
        self.tables: list[tuple[str, str]] = []

    def add(self, given: str, left: Counter[str]) -> None:
        if os.path.isdir(given):
            self._add_folder(given, left)
        elif os.path.lexists(given):
            self._add_file(given)
        elif glob.has_magic(given):
            self._add_matches(given, left)
        elif any(os.path.isfile(given[: at.start()]) for at in BEHIND_A_FILE.finditer(given)):
            self._add_table(given)
        else:
            raise MissingFileError(
                f"{given} is no folder and no file; name the folder that holds the images, or files, tables or tars"
            )

    def _is_wanted(self, path: str) -> bool:
        """Whether a file is called as images are, or videos, or has no ending and begins like one."""
        return is_image_file(path) or (self.videos and is_video_file(path))

    def _add_folder(self, given: str, left: Counter[str]) -> None:
        images = list(walk(given, left, self._is_wanted))
        if self.alone:
            self.files = given, images
        else:
            self.files[1].extend(os.path.join(os.path.normpath(given), name) for name in images)

    def _add_file(self, given: str) -> None:
        if given.lower().endswith(TAR):
            self.tars.append((given, "" if self.alone else os.path.normpath(given)))
        elif self._is_wanted(given):
            self.files[1].append(os.path.normpath(given))
        else:
            self._add_table(given)

    def _add_table(self, given: str) -> None:
        self.tables.append((given, "" if self.alone else os.path.dirname(os.path.normpath(given))))

    def _add_matches(self, given: str, left: Counter[str]) -> None:
        matches = sorted(glob.glob(given, recursive=True))
        if not matches:
            raise MissingFileError(f"no file is called like {given}")
        self.alone = False
        for match in matches:
            if self._is_output(match):
                continue
            if os.path.isdir(match):
                if "**" not in given:  # which names all that lies in it as well
                    self._add_folder(match, left)
            elif self._is_wanted(match) or ending(Path(match)) in (TAR, *TABLES):
                self._add_file(match)
            else:
                left[os.path.splitext(match)[1].lower()] += 1

    def _is_output(self, match: str) -> bool:
        path = os.path.realpath(match)
        return self._output is not None and f"{path}.".startswith(f"{self._output}.")


def left_out(left: Mapping[str, int]) -> str:
    """The files that are no images, in words."""
    kinds = ", ".join(
        f"{count} {suffix or 'without an ending'}"
        for suffix, count in sorted(left.items(), key=lambda own: -own[1])
    )
    total = sum(left.values())
    return f"{total} other file{'s' * (total > 1)} {'were' if total > 1 else 'was'} left out: {kinds}"

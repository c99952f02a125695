"""Images that are members of a tar, each read where it lies; nothing is unpacked."""

import os
import tarfile
from collections import Counter
from pathlib import Path

from mmpeft.data.formats.tars import require_end
from mmpeft.data.image_lists.base import Listed, Part, version_of
from mmpeft.data.images import ENDINGS
from mmpeft.errors import RefusedError


class Tar(Part):
    """Members of a tar, each read where it lies.

    Args:
        path: of the archive.
        prefix: stands before the members' names.
        left: is told of the members that are no images.
    """

    def __init__(self, path: str, prefix: str, left: Counter[str]):
        self.path = path
        self.names: list[str] = []
        self._places: list[tuple[int, int]] = []
        try:
            with tarfile.open(path, "r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # else tarfile keeps each  # pyright: ignore
                    self._add(member, prefix, left)
                require_end(Path(path), tar.offset)
        except (tarfile.TarError, EOFError) as error:
            raise RefusedError(
                f"{path} is no plain tar, or is cut or damaged ({error}); unpack a packed one, or fetch it again"
            ) from None

    def _add(self, member: tarfile.TarInfo, prefix: str, left: Counter[str]) -> None:
        if member.isdir():
            return
        if member.name.lower().endswith(ENDINGS) and member.isfile() and not member.issparse():
            self.names.append(os.path.join(prefix, member.name))
            self._places.append((member.offset_data, member.size))
        else:
            left[os.path.splitext(member.name)[1].lower()] += 1

    def item(self, number: int) -> Listed:
        start, size = self._places[number]
        return Listed(
            self.names[number], lambda: self._read(start, size), lambda: [version_of(self.path), start]
        )

    def _read(self, start: int, size: int) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(start)
            return file.read(size)

"""Shards of a long output: files of rows, each of a fixed stretch of the list, there whole or not at all.

::

    captions.jsonl                  all rows, joined once every shard is there
    captions.jsonl.shards/
      meta.json                     what the shards were made of
      000000.jsonl                  the rows of the first images, and a last line that says what they belong to
      000001.jsonl                  ...
      joined.json                   the hash of the joined file

A shard is written beside its place, brought to disk and renamed. Whoever writes it, however often, it has the same
bytes; what is missing or damaged is what is to be done. So any number of processes can write, and any be killed.
"""

import hashlib
import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmpeft.errors import RefusedError
from mmpeft.files import told_if_full
from mmpeft.hashing import hash_json

ENDING = ".shards"
"""Of the folder that belongs to a file of rows."""


@dataclass(frozen=True)
class Seal:
    """The last line of a shard."""

    of: str
    """Hash of the meta file."""
    shard: int
    rows: int
    errors: int
    """Images that could not be read, or not be answered."""
    sha256: str
    """Of the rows."""
    versions: str
    """Hash of the versions of the images' files."""
    contents: list[str]
    """Of each image the beginning of its content's hash; empty where it cannot be read."""


class Shards:
    """The shards of one output.

    Args:
        folder: where they lie.
        meta: what they are made of, in plain data.
        total: images in all.
        size: images of each.
    """

    def __init__(self, folder: Path, meta: Mapping[str, Any], total: int, size: int):
        self.folder, self.total, self.size, self.of = folder, total, size, hash_json(meta)

    def __len__(self) -> int:
        return -(-self.total // self.size)

    def images(self, shard: int) -> range:
        """The numbers of a shard's images."""
        return range(shard * self.size, min(self.total, (shard + 1) * self.size))

    def path(self, shard: int) -> Path:
        return self.folder / f"{shard:06d}.jsonl"

    def write(self, shard: int, rows: Sequence[Mapping[str, Any]], versions: str, contents: list[str]) -> int:
        """Puts a shard in its place; gives how many of its images have an error.

        Raises:
            RefusedError: there is no room.
        """
        body = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
        errors = len({row.get("image", row.get("video")) for row in rows if "error" in row})
        digest = hashlib.sha256(body).hexdigest()
        seal = Seal(self.of, shard, len(rows), errors, digest, versions, contents)
        publish(self.path(shard), body + json.dumps(asdict(seal)).encode() + b"\n")
        return errors

    def seal(self, shard: int) -> Seal | None:
        """Of a shard that is there and whole; else None.

        Raises:
            RefusedError: it belongs to something else.
        """
        try:
            body, last = self._parts(shard)
            seal = Seal(**json.loads(last))
        except (FileNotFoundError, ValueError, TypeError):
            return None
        if hashlib.sha256(body).hexdigest() != seal.sha256:
            return None
        if (seal.of, seal.shard) != (self.of, shard):
            raise RefusedError(
                f"{self.path(shard)} holds a shard of other captions, or another one of these; remove it, or name "
                "another --output"
            )
        return seal

    def digest(self) -> str:
        """Of the rows of all shards, which are there."""
        return hash_json([seal.sha256 for shard in range(len(self)) if (seal := self.seal(shard))])

    def rows(self, shard: int) -> bytes:
        """The lines of a shard that is there."""
        return self._parts(shard)[0]

    def _parts(self, shard: int) -> tuple[bytes, bytes]:
        content = self.path(shard).read_bytes()
        if not content.endswith(b"\n"):
            raise ValueError("it is cut")
        start = content.rfind(b"\n", 0, -1) + 1
        return content[:start], content[start:]

    def each(self) -> Iterator[bytes]:
        """The lines of every shard, in order."""
        return map(self.rows, range(len(self)))


def publish(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all, whoever else writes the same at the same time.

    Raises:
        RefusedError: there is no room.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with told_if_full(path, len(content)), published(path) as unfinished, unfinished.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def published(path: Path) -> Iterator[Path]:
    """Inside, a file beside ``path`` is written, of this process alone, which takes its place at the end."""
    unfinished = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.part")
    try:
        yield unfinished
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise

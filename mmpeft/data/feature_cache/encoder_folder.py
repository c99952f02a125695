"""The folder of one encoder's features: shards, an index beside each, and what encoder they are of.

::

    <cache>/<encoder>/
      encoder.json              the encoder's fingerprint
      <shard>.safetensors       "features" (images, tokens, dim), or (tokens of all images, dim)
      <shard>.index.json        the images' keys in the order of the rows, their tokens where these differ, and size,
                                time and sha256 of the shard
      lock                      held by the one process that writes
      promised                  how many bytes there will be once it has ended

A shard counts once its index is there, which is written last. It is known by size and time of change, without being
read; `verify` reads every byte. No torch is needed here.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mmpeft.files import write_whole
from mmpeft.hashing import hash_file

ENCODER, LOCK, INDEX, SHARD = "encoder.json", "lock", ".index.json", ".safetensors"
PROMISE = "promised"
"""Bytes that the shards together will have when the process that holds the lock has ended."""
EARLIER = "index.json"
"""Of a version before, which had one index of all shards."""
KEY_BYTES = 32
"""Of a sha256."""
OURS = "[0-9a-f]" * 16
"""What folders of encoders are called."""
FILES = (ENCODER, EARLIER, LOCK, PROMISE, f"*{INDEX}", f"*{SHARD}", f".*{INDEX}.part", f".*{SHARD}.part")
"""All that we write into one."""


def tell(message: str) -> None:
    """Of `mmpeft ask`, stdout is the answer alone."""
    print(f"feature cache: {message}", file=sys.stderr)


@dataclass
class Shard:
    """What the index of a shard says."""

    path: Path
    size: int
    """Bytes."""
    mtime_ns: int
    sha256: str
    keys: bytes
    """`KEY_BYTES` per image, in the order of the rows."""
    tokens: list[int] | None = None
    """Of each image; None where all have as many."""

    def __len__(self) -> int:
        return len(self.keys) // KEY_BYTES

    def __iter__(self) -> Iterator[bytes]:
        return (self.keys[start : start + KEY_BYTES] for start in range(0, len(self.keys), KEY_BYTES))

    @property
    def index(self) -> Path:
        return self.path.with_suffix(INDEX)

    def fault(self) -> str | None:
        """What can be seen without reading it, in words; None if nothing."""
        try:
            size = self.path.stat().st_size
        except FileNotFoundError:
            return "it is missing"
        return None if size == self.size else f"it has {size:,} bytes, wanted {self.size:,}"

    def unchanged(self) -> bool:
        """Whether the file is as it was written; one whose time differs, as that of a copy, is read once and its time
        noted. One that is missing or has another size is not."""
        if self.fault():
            return False
        mtime_ns = self.path.stat().st_mtime_ns
        if mtime_ns == self.mtime_ns:
            return True
        if hash_file(self.path) != self.sha256:
            return False
        self.mtime_ns = mtime_ns
        try:
            self.write_index()
        except OSError as error:  # somebody else's folder, say: it is read again next time
            tell(f"{self.index} cannot be written ({error}); {self.path.name} is checked again next time")
        return True

    def write_index(self) -> None:
        content = {"size": self.size, "mtime_ns": self.mtime_ns, "sha256": self.sha256}
        tokens = {} if self.tokens is None else {"tokens": self.tokens}
        write_whole(self.index, json.dumps(content | tokens | {"keys": self.keys.hex()}))

    def delete(self) -> None:
        """The index first: a shard without one does not count."""
        self.index.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)


class EncoderFolder:
    """The shards of one encoder."""

    def __init__(self, directory: Path):
        self.directory = directory

    def encoder(self) -> dict[str, Any] | None:
        """The fingerprint of the encoder; None where it cannot be read."""
        return _read_object(self.directory / ENCODER)

    def shards(self) -> list[Shard]:
        """Those whose index can be read; of the others it is told."""
        found: list[Shard] = []
        for index in sorted(self.directory.glob(f"*{INDEX}")):
            try:
                found.append(_read_index(index))
            except FileNotFoundError:  # another process has just deleted it
                continue
            except (KeyError, TypeError, ValueError):
                tell(f"{index} is damaged; its images are encoded again")
        return found

    def begin(self, encoder: dict[str, Any]) -> None:
        """Makes the folder."""
        self.directory.mkdir(parents=True, exist_ok=True)
        if self.encoder() != encoder:
            write_whole(self.directory / ENCODER, json.dumps(encoder))

    def add(self, name: str, keys: Iterable[bytes], tokens: list[int]) -> Shard:
        """Writes the index of a shard that has just been written; from now on it counts.

        Args:
            keys: of its images.
            tokens: of each of them.
        """
        path = self.directory / f"{name}{SHARD}"
        state, differ = path.stat(), len(set(tokens)) > 1
        shard = Shard(
            *(path, state.st_size, state.st_mtime_ns, hash_file(path), b"".join(keys)),
            tokens if differ else None,
        )
        shard.write_index()
        return shard

    def promise(self, num_bytes: int) -> None:
        """Says that so many bytes will be added, until they are or `withdraw`. Under the lock."""
        there = sum(shard.size for shard in self.shards())
        write_whole(self.directory / PROMISE, str(there + num_bytes))

    def withdraw(self) -> None:
        """Nothing more will be added. Under the lock."""
        (self.directory / PROMISE).unlink(missing_ok=True)

    def tidy(self) -> None:
        """Deletes what does not count: a killed process's unfinished files, and what is damaged. Under the lock."""
        self.withdraw()
        sound = [shard for shard in self.shards() if not shard.fault()]
        kept = {path for shard in sound for path in (shard.path, shard.index)}
        for pattern in (f"*{SHARD}", f"*{INDEX}", f".*{SHARD}.part", f".*{INDEX}.part"):
            for path in self.directory.glob(pattern):
                if path not in kept:
                    path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Deletes what we wrote, and the folder unless somebody else's files are in it. Under the lock."""
        for pattern in FILES:
            for path in self.directory.glob(pattern):
                path.unlink(missing_ok=True)
        if not any(self.directory.iterdir()):
            self.directory.rmdir()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Inside, this process alone writes here. The system frees the lock of a process that is killed."""
        lock = FileLock(self.directory / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            tell(f"another process writes {self.directory}; waiting until it has ended")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()


def encoder_folders(cache: Path) -> list[EncoderFolder]:
    """The folders of all encoders in a cache folder."""
    return [EncoderFolder(path.parent) for path in sorted(cache.glob(f"{OURS}/{ENCODER}"))]


def earlier_folders(cache: Path) -> list[Path]:
    """The folders that a version before wrote, and nobody reads any more."""
    wrote = (path.parent for path in sorted(cache.glob(f"{OURS}/{EARLIER}")))
    return [path for path in wrote if not (path / ENCODER).exists()]


def _read_object(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _read_index(index: Path) -> Shard:
    content = json.loads(index.read_text())
    path = index.with_name(index.name.removesuffix(INDEX) + SHARD)
    keys = bytes.fromhex(content["keys"])
    if len(keys) % KEY_BYTES:
        raise ValueError("half a key")
    tokens = content.get("tokens")
    if tokens is not None and len(tokens) != len(keys) // KEY_BYTES:
        raise ValueError("an image without the number of its tokens")
    return Shard(path, content["size"], content["mtime_ns"], content["sha256"], keys, tokens)

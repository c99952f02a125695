"""Where record stores are kept, and when one may be opened again in place of reading its files.

Stores lie in ``records/`` of the mmpeft home. The name of one comes from the paths of its files and the settings that
they were read with, so that a file that has changed takes the place of what it was. What is kept is opened if nothing
that it came from has changed: the versions of the files, what records took from the disk beside them (where links lead,
the frames of videos, endings that were found), and this code.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock

from mmpeft.data.layouts.beside import is_still
from mmpeft.data.records import ImageRoot
from mmpeft.data.store import RecordStore, Spool, StoreWriter, open_store
from mmpeft.errors import RefusedError
from mmpeft.files import file_version, whole_file
from mmpeft.hashing import hash_json
from mmpeft.paths import home

KEPT_BYTES = 2**23
"""Files of fewer bytes together are read anew at every start, within a second, and held in memory."""
ENDING = ".records"
Read = Callable[[StoreWriter, ImageRoot], RecordStore]
"""Writes records, and gives them back once all are good."""


def read_or_open(files: Sequence[Path], root: Path, settings: dict[str, Any], read: Read) -> RecordStore:
    """The records of files: from their store if that is still theirs, else read, and kept if they are many.

    Args:
        files: to be read.
        root: of the images.
        settings: whatever changes what the records are.
        read: of the files.

    Raises:
        RefusedError: ``read`` does, a file changes meanwhile, or there is no room for the store.
    """
    if not all(file.is_file() for file in files) or sum(file.stat().st_size for file in files) < KEPT_BYTES:
        return _read(files, root, read)
    paths = [str(file.absolute()) for file in files]
    name = hash_json([paths, os.path.realpath(root), settings])
    path = home() / "records" / (name + ENDING)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if (store := _open(path, files)) is not None:
            return store
        _tidy(path)
        images = ImageRoot(root)
        size = sum(file.stat().st_size for file in files)  # as JSON again, about
        with whole_file(path, size) as unfinished, _unchanged(files) as state:
            with unfinished.open("w+b", buffering=2**20) as file:
                writer = StoreWriter(file)
                read(writer, images)
                writer.finish(
                    {"files": state, "code": code_hash(), "beside": images.beside.told, "paths": paths}
                )
        store = open_store(path)
        assert store is not None, "it was written this moment"
        return store


def _read(files: Sequence[Path], root: Path, read: Read) -> RecordStore:
    """For this process alone."""
    with _unchanged(files):
        return read(StoreWriter(Spool(home() / "records", KEPT_BYTES)), ImageRoot(root))


def _open(path: Path, files: Sequence[Path]) -> RecordStore | None:
    store = open_store(path)
    if store is None or [store.header.get("files"), store.header.get("code")] != [_state(files), code_hash()]:
        return None
    return store if is_still(store.header["beside"]) else None


@contextmanager
def _unchanged(files: Sequence[Path]) -> Iterator[list[list[int]]]:
    """Raises:
    RefusedError: a file has changed since.
    """
    state = _state(files)
    yield state
    if changed := [file for file, was, now in zip(files, state, _state(files), strict=True) if was != now]:
        raise RefusedError(f"{changed[0]} changed while it was read; start again when it is whole")


def _state(files: Sequence[Path]) -> list[list[int]]:
    """The version of every file, as JSON gives it back."""
    return [list(file_version(file)) for file in files]


@cache
def code_hash() -> str:
    """Of the code that reads and encodes: another version may make something else of the same file."""
    digest = hashlib.blake2b(digest_size=16)
    for source in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _tidy(path: Path) -> None:
    """Removes what was counted of the store at ``path``, and stores whose files are gone."""
    for other in path.parent.glob(f"*{ENDING}"):
        store = None if other == path else open_store(other)
        if other == path or (store and not all(Path(file).exists() for file in store.header["paths"])):
            for beside in path.parent.glob(f"{other.stem}.*"):
                if beside.suffix != ".lock":
                    beside.unlink(missing_ok=True)

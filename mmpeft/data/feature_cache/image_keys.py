"""The keys of image files, kept on disk by path and version of the file: a second start reads no image again."""

import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any

from mmpeft.data.feature_cache.encoder_folder import tell
from mmpeft.data.feature_cache.settings import KEYS
from mmpeft.data.images import ImageConfig, ImageLike, image_file, image_key
from mmpeft.data.images.decode import DECODING
from mmpeft.files import FileVersion, file_version

KEPT_BACK = 4096
"""Keys are written in groups of so many, each a short transaction."""
SETTLED_NS = 2 * 10**9
"""A file that changed less long ago may change again without another time, which some disks keep in steps of two
seconds; its key is not kept on disk."""
WAIT_SECONDS = 30.0
COLUMNS = "path BLOB PRIMARY KEY, version TEXT, key BLOB"
"""The version as JSON: an inode may have more bits than SQLite's numbers."""
NAME = f"images_{hashlib.sha256(DECODING + COLUMNS.encode()).hexdigest()[:8]}"
"""Other decoding makes other keys."""
TABLE = f"CREATE TABLE IF NOT EXISTS {NAME} ({COLUMNS}) WITHOUT ROWID"


class ImageKeys:
    """`image_key` of any image; of a file that has been read once, without reading it again.

    The store is shared by processes. Without one, or where it cannot be used, keys are known for this process alone.

    Args:
        config: how images are read.
        directory: of the store; None keeps nothing on disk. It is made with the first key that is written.
    """

    def __init__(self, directory: Path | None, config: ImageConfig | None = None):
        self._config = config or ImageConfig()
        self._path = None if directory is None else directory / KEYS
        self._known: dict[str, tuple[FileVersion, str]] = {}
        """Of this process; those on disk stay there."""
        self._pending: dict[str, tuple[FileVersion, str]] = {}
        self._connection: sqlite3.Connection | None = None
        self._process = 0
        self._lock = Lock()  # a connection serves one thread at a time

    def __call__(self, image: ImageLike) -> str:
        """An image's identity by its content.

        Raises:
            ImageError: it cannot be read.
        """
        if not isinstance(image, str | Path):
            return image_key(image, self._config)
        try:
            version = file_version(image_file(image))
        except (OSError, ValueError):
            return image_key(image, self._config)  # which says what is wrong
        path = os.path.abspath(image)
        with self._lock:
            known = self._known.get(path) or self._pending.get(path) or self._stored(path)
        if known and known[0] == version:
            return known[1]
        key = image_key(image, self._config)
        with self._lock:
            self._remember(path, version, key)
        return key

    def flush(self) -> None:
        """Writes the keys that are not on disk yet."""
        with self._lock:
            self._write()

    def _remember(self, path: str, version: FileVersion, key: str) -> None:
        _, changed_ns, state_changed_ns, _ = version
        if self._path is None or time.time_ns() - max(changed_ns, state_changed_ns) < SETTLED_NS:
            self._known[path] = version, key
            return
        self._known.pop(path, None)
        self._pending[path] = version, key
        if len(self._pending) >= KEPT_BACK:
            self._write()

    def _stored(self, path: str) -> tuple[FileVersion, str] | None:
        if self._path is None or (self._connection is None and not self._path.exists()):
            return None
        query = f"SELECT version, key FROM {NAME} WHERE path = ?"
        row = self._use(lambda store: store.execute(query, (os.fsencode(path),)).fetchone())
        return None if row is None else (tuple(json.loads(row[0])), row[1].hex())

    def _write(self) -> None:
        if self._path is None or not self._pending:
            return
        rows = [
            (os.fsencode(path), json.dumps(version), bytes.fromhex(key))
            for path, (version, key) in self._pending.items()
        ]
        self._use(lambda store: _insert(store, rows))
        if self._path is None:  # it failed
            self._known |= self._pending
        self._pending = {}

    def _use(self, action: Callable[[sqlite3.Connection], Any]) -> Any:
        """Where the store fails it is said once, and this process goes on without it."""
        assert self._path is not None, "asked for where there is one"
        try:
            if self._connection is None or self._process != os.getpid():  # one does not live through a fork
                self._process = os.getpid()
                self._path.parent.mkdir(parents=True, exist_ok=True)
                # a thread may begin what another goes on with, one at a time
                self._connection = sqlite3.connect(self._path, WAIT_SECONDS, check_same_thread=False)
                self._connection.execute(TABLE)
            return action(self._connection)
        except (sqlite3.Error, OSError) as error:
            tell(
                f"{self._path} cannot be used ({error}): every start reads all images again; delete it if it is damaged"
            )
            self._path = self._connection = None
            return None


def _insert(store: sqlite3.Connection, rows: list[tuple[bytes, str, bytes]]) -> None:
    with store:  # one transaction
        store.executemany(f"REPLACE INTO {NAME} VALUES (?, ?, ?)", rows)

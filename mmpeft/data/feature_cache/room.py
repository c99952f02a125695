"""How many bytes a cache folder holds and may still be given. What processes promise to write counts as written, so
that several together stay within the limit."""

import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from mmpeft.data.feature_cache.encoder_folder import LOCK, PROMISE, SHARD

SHARE_OF_THE_DISK = 0.1
"""Of what is free: so much may be filled where nobody says how much."""
ONE_AT_A_TIME = "room.lock"
"""In the folder."""


def size_of(folder: Path) -> int:
    """Bytes of all features in a cache folder."""
    return sum(_sizes(folder).values())


def room(folder: Path, max_gb: float | None) -> tuple[int, str]:
    """How many bytes may still be written into a cache folder, and the rule that says so, in words."""
    if max_gb is not None:
        return max(
            0, int(max_gb * 1e9) - _promised_size(folder)
        ), f"data.cache.max_gb is {max_gb:g} for all of it"
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(existing).free
    rule = "a tenth of the free disk; data.cache.max_gb sets another limit"
    return int(free * SHARE_OF_THE_DISK), rule


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Inside, no other process looks for room to write: it will see what is promised there."""
    with FileLock(folder / ONE_AT_A_TIME):
        yield


def _promised_size(folder: Path) -> int:
    """What there will be once all that write now have ended."""
    sizes = _sizes(folder)
    for path in folder.glob(f"*/{PROMISE}"):
        if _is_written(path.parent):
            sizes[path.parent] = max(sizes[path.parent], _number(path))
    return sum(sizes.values())


def _sizes(folder: Path) -> Counter[Path]:
    sizes: Counter[Path] = Counter()
    for path in folder.rglob(f"*{SHARD}"):
        try:
            sizes[path.parent] += path.stat().st_size
        except FileNotFoundError:  # another process has just deleted it
            continue
    return sizes


def _is_written(folder: Path) -> bool:
    """Whether a process writes there now, or it cannot be told; one that was killed may have left its promise."""
    try:
        with FileLock(folder / LOCK, timeout=0):
            return False
    except OSError:  # of which filelock's Timeout is one
        return True


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except (FileNotFoundError, ValueError):  # it has just ended, or not yet begun
        return 0

"""JSON files, files that are written whole or not at all, disks without room for them, and versions of files."""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmpeft.errors import RefusedError

if TYPE_CHECKING:
    from torch import Tensor

DISK_IS_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}

FileVersion = tuple[int, int, int, int]
"""(bytes, time of change in ns, time of change of the state in ns, inode)"""


def file_version(path: str | Path) -> FileVersion:
    """What tells a file that was seen from any other in its place. Size and time of change alone do not: both are the
    other's after ``mv``, ``cp -p``, ``rsync -t`` or an archive; the time of the state changes with whatever is written.

    Raises:
        OSError, ValueError: there is no such file, or no such name.
    """
    state = os.stat(path)
    return state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino


def version_if_there(path: str | Path) -> list[int] | None:
    """`file_version` as JSON holds it; None where there is no such file."""
    try:
        return list(file_version(path))
    except (OSError, ValueError):
        return None


def read_json(path: Path) -> Any:
    """The content of a JSON file; {} where there is none.

    Raises:
        RefusedError: it is damaged.
    """
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise RefusedError(f"{path} is damaged ({error}); remove it, or what it belongs to") from None


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file that has one on every line.

    Raises:
        RefusedError: a line is none.
    """
    rows: list[dict[str, Any]] = []
    # no `splitlines`: texts within may hold U+2028 and other ends of lines that JSON does not escape
    for number, line in enumerate(path.read_text("utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise RefusedError(f"{path}, line {number} is damaged ({error}); make the file anew") from None
        if not isinstance(row, dict):
            raise RefusedError(f"{path}, line {number} is {line[:40]!r}; wanted an object, {{...}}")
        rows.append(row)
    return rows


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file whole or not at all, and the folder for it."""
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Writes a file whole or not at all, and the folder for it.

    Raises:
        RefusedError: there is no room. What was there is kept.
    """
    content = text.encode()
    with whole_file(path, len(content)) as unfinished:
        unfinished.write_bytes(content)


def save_tensors(tensors: Mapping[str, "Tensor"], path: Path) -> None:
    """Writes a safetensors file whole or not at all, and the folder for it.

    Raises:
        RefusedError: there is no room. What was there is kept.
    """
    from safetensors.torch import save_file

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole_file(path, sum(tensor.nbytes for tensor in contiguous.values())) as unfinished:
        save_file(contiguous, unfinished, metadata={"format": "pt"})


@contextmanager
def whole_file(path: Path, num_bytes: int) -> Iterator[Path]:
    """Inside, a file beside ``path`` is written, which takes its place at the end, with any new file's permissions.
    If it cannot be written, it is gone and ``path`` is as it was.

    Args:
        path: the file; its folder is made.
        num_bytes: that it will have.

    Raises:
        RefusedError: there is no room.
    """
    with _in_place_of(path, num_bytes, lambda unfinished: unfinished.unlink(missing_ok=True)) as unfinished:
        yield unfinished
        ordinary_permissions(unfinished)  # safetensors' own are 0600


@contextmanager
def whole_folder(path: Path, num_bytes: int) -> Iterator[Path]:
    """Inside, a folder beside ``path`` is filled, which takes its place at the end. Where an error comes between,
    nothing is there; a process that was killed leaves the hidden folder ``.NAME.part``, which the next one clears away.

    Args:
        path: the folder, empty or not there.
        num_bytes: that it will have.

    Raises:
        RefusedError: there is no room.
    """
    with _in_place_of(path, num_bytes, shutil.rmtree) as unfinished:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        yield unfinished


@contextmanager
def _in_place_of(path: Path, num_bytes: int, remove: Callable[[Path], object]) -> Iterator[Path]:
    """Inside, what is yielded is made, which takes the place of ``path`` at the end, or is removed after an error."""
    unfinished = path.with_name(f".{path.name}.part")
    with told_if_full(path, num_bytes):
        path.parent.mkdir(parents=True, exist_ok=True)
        require_space(path, num_bytes)
        try:
            yield unfinished
        except BaseException:
            remove(unfinished)
            raise
    os.replace(unfinished, path)


def append(path: Path, content: bytes) -> None:
    """Adds to a file, and has it on disk before it returns.

    Raises:
        RefusedError: there is no room. A part may have been written.
    """
    with told_if_full(path, len(content)), path.open("ab") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def told_if_full(path: Path, num_bytes: int) -> Iterator[None]:
    """Inside, so many bytes are written to a file.

    Raises:
        RefusedError: there is no room for them, or they may not be written; the system itself names no file, or ours
            that is not finished.
    """
    try:
        yield
    except Exception as error:
        if is_full(error):
            raise no_space(path, num_bytes) from error
        if isinstance(error, OSError) and error.errno in READ_ONLY:
            raise RefusedError(
                f"{path} cannot be written: {error.strerror} ({size_in_words(num_bytes)} are needed). What was there "
                "is kept: make its folder writable, then go on"
            ) from error
        raise


def require_space(path: Path, wanted: int) -> None:
    """Raises:
    RefusedError: the disk of an existing folder has no room for a file of so many bytes.
    """
    if shutil.disk_usage(path.parent).free < wanted:
        raise no_space(path, wanted)


def no_space(path: Path, wanted: int) -> RefusedError:
    """For a file of so many bytes that cannot be written."""
    free = shutil.disk_usage(path.parent).free
    return RefusedError(
        f"{path}: no space left on its disk, or beyond a limit on files: {size_in_words(wanted)} are needed, "
        f"{free / 1e6:,.1f} MB are free. What was there is kept: make room, then go on"
    )


def size_in_words(size: int) -> str:
    """Bytes, for people."""
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size:,} bytes"


def is_full(error: BaseException | None) -> bool:
    """Whether a full disk lies under an error; torch wraps the system's own, safetensors tells its number in words."""
    while error is not None:
        if isinstance(error, OSError):
            return error.errno in DISK_IS_FULL
        if told := re.search(r"\(os error (\d+)\)", str(error)):
            return int(told[1]) in DISK_IS_FULL
        error = error.__cause__ or error.__context__
    return False


def ordinary_permissions(path: Path) -> None:
    """Those that a newly made file has."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)

"""WebDataset: the members of a tar grouped by base name -> rows, read from front to back and never unpacked to disk.

A member is data, never a program: pickles, links, devices and names that lead out of the archive are refused.
"""

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmpeft.data.formats.base import DataError, Place, Rows
from mmpeft.data.formats.classes import image_of_class
from mmpeft.data.formats.json_text import RowDecoder
from mmpeft.data.image_names import is_image_name

PICKLES = ("pyd", "pkl", "pickle", "pth", "pt", "npy", "npz", "ten", "tb", "joblib", "mp", "msg")
TEXTS = {"txt": "text", "text": "text", "caption": "text", "question": "question", "answer": "answer"}
"""Ending of a text member -> the key of its row."""
CLASSES = ("cls", "cls2", "class", "index")
LARGEST_MEMBER = 2**30
"""Bytes. A larger one is no image and no text."""
IMG2DATASET = frozenset(
    {"key", "url", "status", "error_message", "width", "height", "original_width", "original_height", "exif"}
    | {"sha256", "md5", "similarity", "punsafe", "pwatermark", "hash", "uid"}
)
"""What img2dataset writes beside the caption about where an image came from."""


def tar_rows(path: Path) -> Rows:
    """Rows by the base name of their members."""
    base: str | None = None
    row: dict[str, Any] = {}
    seen: set[int] = set()
    offset = 0
    try:
        with tarfile.open(path, "r|") as tar:  # a stream: nothing is sought for, no index is made
            for member in _members(tar):
                offset = member.offset
                name, ending = _name_and_ending(member, offset)
                if name != base:
                    if base is not None:
                        yield base, _merged(row, base)
                    if hash(name) in seen:
                        raise DataError(
                            f"{name!r} comes twice, at byte {offset}, not in sequence; sort the archive"
                        )
                    seen.add(hash(name))
                    base, row = name, {}
                if ending in row:
                    raise DataError(f"{member.name!r} comes twice, at byte {offset}; write each member once")
                row[ending] = _content(tar, member)
            require_end(path, tar.offset)
        if base is not None:
            yield base, _merged(row, base)
    except DataError as error:
        yield base or "start", error
    except (tarfile.TarError, EOFError, OSError) as error:
        yield (
            _after(base),
            DataError(
                f"the archive is cut or damaged after byte {offset} ({error}); fetch or write the shard again"
            ),
        )


def _after(base: str | None) -> Place:
    return "start" if base is None else f"after {base!r}"


def require_end(path: Path, offset: int) -> None:
    """tarfile takes a damaged header, and the end of a file that was cut between members, for the archive's end.

    Raises:
        ReadError: the end mark is not there.
    """
    with open(path, "rb") as file:
        file.seek(offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("no member and no end mark follows")


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The files of the archive in order."""
    while (member := tar.next()) is not None:
        tar.members = []  # else tarfile keeps each: 1 GB for a million  # pyright: ignore
        if not member.isdir():
            yield member


def _name_and_ending(member: tarfile.TarInfo, offset: int) -> tuple[str, str]:
    where = f"{member.name!r} at byte {offset}"
    if not member.isfile():
        raise DataError(f"{where} is a link or a device; wanted plain files: write the archive again")
    parts = member.name.split("/")
    if member.name.startswith("/") or ".." in parts or "\\" in member.name or "\0" in member.name:
        raise DataError(f"{where} leads out of the archive; write it again with plain names")
    if member.size > LARGEST_MEMBER:
        raise DataError(f"{where} has {member.size:,} bytes; wanted at most {LARGEST_MEMBER:,}")
    first, dot, ending = parts[-1].partition(".")
    if not dot or not first:
        raise DataError(
            f"{where} has no base name and ending, such as 'shop/0001.jpg'; name it so, or take it out"
        )
    if ending.lower().rpartition(".")[2] in PICKLES:
        raise DataError(
            f"{where} can hold a program (pickle); wanted images, .txt, .json and .cls: take it out"
        )
    return "/".join([*parts[:-1], first]), ending.lower()


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    data = file.read() if file is not None else b""
    if len(data) != member.size:
        raise tarfile.ReadError(f"{member.name!r} has {len(data)} of {member.size} bytes")
    return data


def _merged(members: dict[str, bytes], base: str) -> Any:
    """The row of one sample: its image, its texts and the keys of its JSON."""
    try:
        images = {ending: data for ending, data in members.items() if is_image_name(f"x.{ending}")}
        if len(images) > 1:
            raise DataError(f"has the images {sorted(images)}, in which order is not told; keep one")
        row: dict[str, Any] = {}
        for ending, data in members.items():
            if ending in images:
                row["image"] = data
            elif ending == "json":
                _add(row, _object(data, base))
            elif ending in TEXTS:
                _add(row, {TEXTS[ending]: _text(data, ending)})
            elif ending in CLASSES:
                _add(row, {"label": _class(_text(data, ending))})
            else:
                raise DataError(
                    f"its member .{ending} is not known; wanted images, .txt, .json, .cls: take it out"
                )
        if row.keys() == {"image", "label"}:  # of which classes it is one, no shard says
            return image_of_class(row["image"], row["label"], [])
        return row
    except DataError as error:
        return error


def _add(row: dict[str, Any], more: dict[str, Any]) -> None:
    if "text" in row and more.get("caption") == row["text"]:
        more = {key: value for key, value in more.items() if key != "caption"}
    if row.get("caption") is not None and more.get("text") == row["caption"]:
        del row["caption"]
    if both := [key for key in more if row.get(key) is not None and more[key] is not None]:
        raise DataError(f"{both[0]!r} is given by two members; keep it in one")
    row |= more


def _object(data: bytes, base: str) -> dict[str, Any]:
    try:
        value = RowDecoder().decode(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"its .json is not valid: {error}") from None
    if isinstance(value, DataError):
        raise value
    if not isinstance(value, dict):
        raise DataError(f"its .json holds a {type(value).__name__}; wanted an object")
    if value.get("key") == base.rpartition("/")[2] and "status" in value:
        return {key: item for key, item in value.items() if key not in IMG2DATASET}
    return value


def _text(data: bytes, ending: str) -> str:
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DataError(f"its .{ending} is not UTF-8 at byte {error.start}; save it as UTF-8") from None


def _class(text: str) -> str:
    if text.strip().lstrip("-").isdigit():
        raise DataError(
            f"its class is the number {text.strip()}, whose name is not told; write the name instead"
        )
    return text

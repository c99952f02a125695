"""Large pages of parquet, value by value: pyarrow reads a page whole, and holds it packed and unpacked.

pandas writes 1,024 rows into a page of a column, and so 1.2 GB are held of 600 MB of images. Here such a page is
unpacked piece by piece into a nameless file under the mmpeft home, and a value is read from there when its row's turn
comes.

Source: apache/parquet-format, parquet.thrift and Encodings.md.
"""

import os
import tempfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mmpeft.data.formats.page_codecs import CODECS, HELD, PIECES, pieces, varint
from mmpeft.paths import home

LARGE = 2**25
"""Unpacked bytes from which a page is read here."""
HEADER = 2**16
"""Bytes that hold the header of a page."""
DATA, DICTIONARY, DATA_V2 = 0, 2, 3
PLAIN, RLE = 0, 3
INDEXED = (2, 8)
ENCODINGS = {"PLAIN", "RLE", "BIT_PACKED", "PLAIN_DICTIONARY", "RLE_DICTIONARY"}


@dataclass(frozen=True)
class Page:
    """Where the body of a page lies and what its header says."""

    at: int
    packed: int
    unpacked: int
    kind: int
    told: dict[int, Any]
    """Fields of the header of its kind, by their number."""


def is_large(path: Path, column: Any) -> bool:
    """Whether a column of a row group has a page that is better read here, and can be.

    Args:
        column: pyarrow's metadata of it.
    """
    if column.total_uncompressed_size < LARGE or column.physical_type != "BYTE_ARRAY":
        return False
    if column.compression not in CODECS or not ENCODINGS.issuperset(column.encodings):
        return False
    packs_little = 2 * column.total_compressed_size > column.total_uncompressed_size
    if column.compression in PIECES and not packs_little:  # unpacking it here would take minutes
        return False
    with path.open("rb") as file:
        return any(page.unpacked >= LARGE for page in _pages(file, column))


def values(path: Path, column: Any, most: int) -> Iterator[tuple[int, bytes | None]]:
    """The definition level of each row of a column that is no list, and its value; None of a lower level than ``most``.

    Args:
        most: the column's largest definition level.

    Raises:
        ValueError: a page is damaged.
    """
    words: tuple[BinaryIO, array[int]] | None = None
    try:
        with path.open("rb", buffering=2**20) as file:
            for page in _pages(file, column):
                if page.kind == DICTIONARY:
                    body = _body(file, column.compression, page)
                    words = body, _starts(body, page.told[1])
                elif page.kind in (DATA, DATA_V2):
                    yield from _of_page(file, column, page, most, words)
    except (IndexError, KeyError) as error:
        raise ValueError("a page is damaged") from error


def _of_page(
    file: BinaryIO, column: Any, page: Page, most: int, words: "tuple[BinaryIO, array[int]] | None"
) -> Iterator[tuple[int, bytes | None]]:
    count, encoding = page.told[1], page.told[4 if page.kind == DATA_V2 else 2]
    if page.kind == DATA and page.told[3] != RLE:
        raise ValueError(f"levels have the encoding {page.told[3]}")
    body = _body(file, column.compression, page)
    length = page.told[5] if page.kind == DATA_V2 else int.from_bytes(body.read(4), "little") if most else 0
    levels = _hybrid(body.read(length), most.bit_length(), count) if most else [0] * count
    if encoding == PLAIN:
        for level in levels:
            yield level, (_next(body) if level == most else None)
        return
    if encoding not in INDEXED or words is None:
        raise ValueError(f"a page has the encoding {encoding}")
    width = body.read(1)
    present = levels.count(most)
    indices = iter(_hybrid(body.read(), width[0], present) if present else [])
    for level in levels:
        yield level, (_at(*words, next(indices)) if level == most else None)


def _pages(file: BinaryIO, column: Any) -> Iterator[Page]:
    at = min(filter(None, (column.dictionary_page_offset, column.data_page_offset)))
    end = at + column.total_compressed_size
    while at < end:
        try:
            fields, length = _struct(os.pread(file.fileno(), HEADER, at), 0)
            told = fields.get({DATA: 5, DICTIONARY: 7, DATA_V2: 8}.get(fields[1], 0), {1: 0})
            page = Page(at + length, fields[3], fields[2], fields[1], told)
        except (IndexError, KeyError) as error:
            raise ValueError(f"the page at byte {at} is damaged") from error
        if (
            not 0 <= page.packed <= end - page.at
            or page.unpacked < 0
            or not 0 <= told[1] <= column.num_values
        ):
            raise ValueError(f"the page at byte {at} is damaged")
        yield page
        at = page.at + page.packed


# Bodies.


def _body(file: BinaryIO, codec: str, page: Page) -> BinaryIO:
    """The unpacked body of a page, from its beginning."""
    folder = home() / "records"  # a system's own folder may lie in memory
    folder.mkdir(parents=True, exist_ok=True)
    body: Any = tempfile.SpooledTemporaryFile(HELD, dir=str(folder))  # noqa: SIM115 it lives as long as it is read
    file.seek(page.at)
    if page.kind == DATA_V2:  # levels are not packed
        body.write(file.read(page.told[5] + page.told[6]))
        codec = codec if page.told.get(7, True) else "UNCOMPRESSED"
    for piece in pieces(file, codec, page.unpacked - body.tell()):
        body.write(piece)
    if body.tell() != page.unpacked:
        raise ValueError(f"a page at byte {page.at} has {body.tell()} of {page.unpacked} bytes")
    body.seek(0)
    return body


# Values.


def _next(body: BinaryIO) -> bytes:
    return body.read(int.from_bytes(body.read(4), "little"))


def _starts(body: BinaryIO, count: int) -> "array[int]":
    """Where each value of a dictionary begins."""
    starts, at = array("q"), 0
    for _ in range(count):
        starts.append(at)
        body.seek(at)
        at += 4 + int.from_bytes(body.read(4), "little")
    return starts


def _at(body: BinaryIO, starts: "array[int]", number: int) -> bytes:
    body.seek(starts[number])
    return _next(body)


def _hybrid(data: bytes, width: int, count: int) -> list[int]:
    """Numbers of ``width`` bits: runs of one value, and bits one after the other."""
    import numpy as np

    if not width:
        return [0] * count
    found: list[int] = []
    at = 0
    while len(found) < count:
        head, at = varint(data, at)
        if head & 1:
            packed = np.frombuffer(data, np.uint8, (head >> 1) * width, at)
            bits = np.unpackbits(packed, bitorder="little").reshape(-1, width).astype(np.int64)
            found += (bits << np.arange(width)).sum(1).tolist()
            at += len(packed)
        else:
            size = (width + 7) // 8
            found += [int.from_bytes(data[at : at + size], "little")] * min(head >> 1, count)
            at += size
    return found[:count]


# Thrift's compact protocol, as far as headers of pages have it.


def _struct(data: bytes, at: int) -> tuple[dict[int, Any], int]:
    fields: dict[int, Any] = {}
    number = 0
    while data[at]:
        kind, step = data[at] & 15, data[at] >> 4
        number, at = (number + step, at + 1) if step else _signed(data, at + 1)
        if kind in (1, 2):
            fields[number] = kind == 1
        elif kind in (4, 5, 6):
            fields[number], at = _signed(data, at)
        elif kind == 8:
            size, at = varint(data, at)
            fields[number], at = data[at : at + size], at + size
        elif kind == 12:
            fields[number], at = _struct(data, at)
        else:
            raise ValueError(f"a page's header has a field of kind {kind}")
    return fields, at + 1


def _signed(data: bytes, at: int) -> tuple[int, int]:
    value, at = varint(data, at)
    return value >> 1 ^ -(value & 1), at

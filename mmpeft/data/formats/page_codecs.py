"""Codecs of parquet's pages, unpacked piece by piece: pyarrow's streams where it has them, ours where it unpacks a page
whole alone.

Source: google/snappy, format_description.txt; lz4/lz4, lz4_Block_format.md.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

HELD = 2**20
"""Bytes of a page that are held; what is more lies in a file."""
WINDOW = 2**16
"""How far back a piece of snappy refers."""
STREAMED = {"ZSTD": "zstd", "GZIP": "gzip", "BROTLI": "brotli"}
"""Codecs that pyarrow unpacks piece by piece, as it calls them."""
CODECS = ("UNCOMPRESSED", "SNAPPY", "LZ4", *STREAMED)
"""All that pyarrow writes; LZ4 in the raw format, one block a page."""


def pieces(file: BinaryIO, codec: str, left: int) -> Iterator[bytes]:
    """So many bytes, unpacked from where the file stands."""
    if not left:
        return
    if codec in PIECES:
        yield from PIECES[codec](file, left)
        return
    with _unpacked(file, codec) as stream:
        while left and (piece := stream.read(min(left, HELD))):
            left -= len(piece)
            yield piece


@contextmanager
def _unpacked(file: BinaryIO, codec: str) -> Iterator[Any]:
    """A stream of what is packed where the file stands."""
    if codec not in STREAMED:
        yield file
        return
    import pyarrow as pa

    with open(file.name, "rb") as own:  # which pyarrow closes
        own.seek(file.tell())
        yield pa.CompressedInputStream(own, STREAMED[codec])


def unsnapped(file: BinaryIO, left: int) -> Iterator[bytes]:
    """Pieces of what snappy packed, so many bytes in all."""
    if (told := _varint_of(file)) != left:
        raise ValueError(f"what snappy packed has {told} bytes, not {left}")
    recent = bytearray()
    while left > 0:
        tag = file.read(1)[0]
        kind, size = tag & 3, tag >> 2
        if kind == 0:
            size = int.from_bytes(file.read(size - 59), "little") if size >= 60 else size
            size += 1
            yield from _read(file, recent, size)
        else:
            back = int.from_bytes(file.read((1, 2, 4)[kind - 1]), "little")
            back, size = (back | tag >> 5 << 8, (size & 7) + 4) if kind == 1 else (back, size + 1)
            yield from _copy(recent, back, size)
        left -= size
    yield bytes(recent)


def unpacked_lz4(file: BinaryIO, left: int) -> Iterator[bytes]:
    """Pieces of a block of LZ4, so many bytes in all."""
    recent = bytearray()
    while left > 0:
        token = file.read(1)[0]
        size = _lz4_length(file, token >> 4)
        yield from _read(file, recent, size)
        left -= size
        if left > 0:
            back = int.from_bytes(file.read(2), "little")
            size = _lz4_length(file, token & 15) + 4
            yield from _copy(recent, back, size)
            left -= size
    yield bytes(recent)


def _lz4_length(file: BinaryIO, size: int) -> int:
    if size == 15:
        while (more := file.read(1)[0]) == 255:
            size += 255
        size += more
    return size


def _read(file: BinaryIO, recent: bytearray, size: int) -> Iterator[bytes]:
    """Appends so many bytes as they stand in the file."""
    while size:
        if not (read := file.read(min(size, HELD))):
            raise ValueError("what is packed ends too early")
        recent += read
        size -= len(read)
        yield from _beyond_window(recent)


def _copy(recent: bytearray, back: int, size: int) -> Iterator[bytes]:
    """Appends what lies so far back; it may reach into itself."""
    if not 0 < back <= len(recent):
        raise ValueError("what is packed refers too far back")
    while size:
        begin, some = len(recent) - back, min(size, HELD)
        copied = bytes(recent[begin : begin + some])
        recent += (copied * -(-some // len(copied)))[:some]
        size -= some
        yield from _beyond_window(recent)


def _beyond_window(recent: bytearray) -> Iterator[bytes]:
    """What no later piece refers to, once that is much."""
    if len(recent) > HELD:
        yield bytes(recent[:-WINDOW])
        del recent[:-WINDOW]


def _varint_of(file: BinaryIO) -> int:
    head = file.read(5)
    value, length = varint(head, 0)
    file.seek(length - len(head), os.SEEK_CUR)
    return value


def varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where what follows begins."""
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        shift, at = shift + 7, at + 1
        if data[at - 1] < 128:
            return value, at


PIECES: dict[str, Callable[[BinaryIO, int], Iterator[bytes]]] = {"SNAPPY": unsnapped, "LZ4": unpacked_lz4}
"""Codecs of which pyarrow unpacks a page as a whole alone."""

"""Bytes of text files as UTF-8: a .gz is unpacked as it is read, a byte order mark says what else was written."""

import codecs
import gzip
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

ENDINGS_PACKED = (".gz",)
MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def ending(path: Path) -> str:
    """The ending that tells the format, such as ".csv" of "a.CSV.gz"."""
    return Path(path.stem if path.suffix.lower() in ENDINGS_PACKED else path.name).suffix.lower()


@contextmanager
def open_utf8(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """The file's bytes as UTF-8, and how many bytes stand before them (the mark)."""
    with open(path, "rb") as file:
        stream: Any = gzip.GzipFile(fileobj=file) if path.suffix.lower() in ENDINGS_PACKED else file
        head = stream.read(4)
        mark, encoding = next((pair for pair in MARKS if head.startswith(pair[0])), (b"", "utf-8"))
        stream.seek(len(mark))
        recoded = io.BufferedReader(_Recoded(stream, encoding))  # pyright: ignore[reportArgumentType]
        yield (stream, len(mark)) if encoding == "utf-8" else (recoded, 0)


class _Recoded(io.RawIOBase):
    """A stream of another encoding as UTF-8."""

    def __init__(self, stream: BinaryIO, encoding: str) -> None:
        self._stream, self._left = stream, b""
        self._decoder = codecs.getincrementaldecoder(encoding)()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        while not self._left:
            data = self._stream.read(2**16)
            self._left = self._decoder.decode(data, final=not data).encode("utf-8", "surrogatepass")
            if not data:
                break
        part, self._left = self._left[: len(buffer)], self._left[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)

"""The record store: many records as bytes, on disk or in memory, each made a `Record` when it is asked for.

::

    line, line, [image] line, ...   a record is a line of JSON; an image that came as bytes lies before the first
                                    record that has it
    starts, ends, image sets        of every line, 8, 8 and 4 bytes a record
    header, its length              JSON: what the records were read from, and their hash

Plain bytes and offsets: a record is read with one `pread`, in a few microseconds, whatever fields records have. Arrow
would take ten times as long to give one back as Python values, and of a memory map every page read counts as this
process's memory.
"""

import hashlib
import io
import json
import os
import sys
import tempfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from mmpeft.data.records import Record
from mmpeft.data.sequences import Chained, Lazy, Part

FORMAT = 1
DIGEST_BYTES = 16
LENGTH_BYTES = 8
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class RecordStore(Lazy[Record]):
    """Records in the order in which they were read.

    Args:
        read: (start, end) -> the bytes between.
        starts: of every record's line.
        ends: of every record's line.
        image_sets: a number for the images of every record; records of the same images have the same.
        content: hash of all records.
        header: what they were read from.
        path: file of a store that is kept; None of one that goes with the process.
    """

    def __init__(
        self,
        read: Callable[[int, int], bytes],
        starts: "array[int]",
        ends: "array[int]",
        image_sets: "array[int]",
        content: str,
        header: dict[str, Any] | None = None,
        path: Path | None = None,
    ):
        self._read, self._starts, self._ends = read, starts, ends
        self.image_sets, self.content, self.header, self.path = image_sets, content, header or {}, path

    @property
    def notes(self) -> dict[str, Any]:
        """What the reading noted."""
        return self.header.get("notes", {})

    def __len__(self) -> int:
        return len(self._starts)

    def item(self, number: int) -> Record:
        line = self._read(self._starts[number], self._ends[number])
        record = json.loads(line.decode("utf-8", "surrogatepass"))
        record["turns"] = [(question, answer) for question, answer in record["turns"]]
        record["images"] = [
            image if isinstance(image, str) else self._read(*image) for image in record["images"]
        ]
        return record


class StoreWriter:
    """Writes records one after the other.

    Args:
        file: empty, to be written and read.
    """

    def __init__(self, file: "BinaryIO | Spool"):
        self._file, self._at = file, 0
        self._starts, self._ends = array("q"), array("q")
        self._sets = bytearray()
        self._images: dict[bytes, list[int]] = {}
        self._content = hashlib.blake2b(digest_size=DIGEST_BYTES)
        self.notes: dict[str, Any] = {}
        """What else is to be known of the reading, as JSON holds it; `RecordStore.notes` has it at every start."""

    def __len__(self) -> int:
        return len(self._starts)

    def add(self, record: Record) -> None:
        """Appends a record."""
        images = [image if isinstance(image, str) else self._image(image) for image in record["images"]]
        named = _encode(images).encode("utf-8", "surrogatepass")
        self._sets += hashlib.blake2b(named, digest_size=DIGEST_BYTES).digest()
        line = _encode({**record, "images": images}).encode("utf-8", "surrogatepass")
        self._content.update(line)
        self._starts.append(self._at)
        self._write(line)
        self._ends.append(self._at)

    def records(self) -> RecordStore:
        """What has been written, without its index."""
        self._file.flush()
        content = self._content.hexdigest()
        header = {"notes": self.notes}
        return RecordStore(reader(self._file), self._starts, self._ends, self._numbered(), content, header)

    def finish(self, header: dict[str, Any]) -> None:
        """Ends a file that is to be kept: `open_store` opens it."""
        store = self.records()
        for index in (self._starts, self._ends, store.image_sets):
            self._write(index.tobytes())
        told = {"format": FORMAT, "order": sys.byteorder, "records": len(self), "content": store.content}
        text = json.dumps(header | store.header | told).encode()
        self._write(text + len(text).to_bytes(LENGTH_BYTES, "little"))
        self._file.flush()

    def _image(self, image: bytes) -> list[int]:
        """Where an image's bytes lie, which are written once."""
        digest = hashlib.blake2b(image, digest_size=DIGEST_BYTES).digest()
        if digest not in self._images:
            self._images[digest] = [self._at, self._at + len(image)]
            self._content.update(digest)
            self._write(image)
        return self._images[digest]

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._at += len(content)

    def _numbered(self) -> "array[int]":
        """Equal digests as equal numbers."""
        import numpy as np  # here, so that reading a small file needs no numpy before its rows are there

        digests = np.frombuffer(self._sets, f"S{DIGEST_BYTES}")
        return array("i", np.unique(digests, return_inverse=True)[1].astype(np.int32).tobytes())


class Spool:
    """A file of a process's own: in memory up to ``most`` bytes, then a nameless one in a folder."""

    def __init__(self, folder: Path, most: int):
        self._file: Any = io.BytesIO()
        self._folder, self._most = folder, most

    def write(self, content: Any) -> int:
        if isinstance(self._file, io.BytesIO) and self._file.tell() + len(content) > self._most:
            self._folder.mkdir(parents=True, exist_ok=True)
            held = self._file.getbuffer()
            self._file = tempfile.TemporaryFile(dir=self._folder, buffering=2**20)  # noqa: SIM115 lives on
            self._file.write(held)
        return self._file.write(content)

    def flush(self) -> None:
        self._file.flush()

    def reader(self) -> Callable[[int, int], bytes]:
        return reader(self._file)


def reader(file: Any) -> Callable[[int, int], bytes]:
    """(start, end) -> bytes of a file, without a place in it that threads and forks would share."""
    if isinstance(file, Spool):
        return file.reader()
    if isinstance(file, io.BytesIO):
        return lambda start, end: file.getbuffer()[start:end].tobytes()
    return lambda start, end: _pread(file, start, end)


def _pread(file: BinaryIO, start: int, end: int) -> bytes:
    content = os.pread(file.fileno(), end - start, start)
    while len(content) < end - start:  # the system gives 2 GiB at most
        more = os.pread(file.fileno(), end - start - len(content), start + len(content))
        if not more:
            raise OSError(f"{file.name} ends before byte {end}")
        content += more
    return content


def open_store(path: Path) -> RecordStore | None:
    """A store that was finished; None where there is none that can be read."""
    try:
        file = path.open("rb")
        size = os.fstat(file.fileno()).st_size
        at = size - LENGTH_BYTES
        at -= int.from_bytes(_pread(file, at, size), "little")
        if at < 0:
            return None
        header = json.loads(_pread(file, at, size - LENGTH_BYTES))
        if (header["format"], header["order"]) != (FORMAT, sys.byteorder):
            return None
        index = [array("q"), array("q"), array("i")]
        at -= header["records"] * sum(each.itemsize for each in index)
        for each in index:
            end = at + header["records"] * each.itemsize
            each.frombytes(_pread(file, at, end))
            at = end
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return RecordStore(reader(file), index[0], index[1], index[2], header["content"], header, path)


def content_of(records: Sequence[Record]) -> str | None:
    """Hash of records that lie in a store; None of others."""
    if isinstance(records, Part) and isinstance(records.whole, RecordStore):
        return f"{records.whole.content} {_told(records.numbers)}"
    return records.content if isinstance(records, RecordStore) else None


def _told(numbers: Sequence[int]) -> str:
    return str(numbers) if isinstance(numbers, range) else hashlib.sha256(array("q", numbers)).hexdigest()


def path_of(records: Sequence[Record]) -> Path | None:
    """File of the store that records lie in, if it is kept."""
    whole = records.whole if isinstance(records, Part) else records
    return whole.path if isinstance(whole, RecordStore) else None


def first_of_image_sets(records: Sequence[Record]) -> Iterator[Record]:
    """Of records that have the same images the first alone; of those that lie in no store, all."""
    if isinstance(records, Chained):
        for part in records.parts:
            yield from first_of_image_sets(part)
    elif isinstance(records, RecordStore) and len(records):
        yield from map(records.item, _firsts(records.image_sets, range(len(records))))
    elif isinstance(records, Part) and isinstance(records.whole, RecordStore) and len(records):
        yield from map(records.item, _firsts(records.whole.image_sets, records.numbers))
    else:
        yield from records


def _firsts(image_sets: "array[int]", numbers: Sequence[int]) -> list[int]:
    """Places among ``numbers`` of the first record of every image set, in order."""
    import numpy as np

    sets = np.frombuffer(image_sets, np.int32)[np.asarray(numbers, np.int64)]
    return np.sort(np.unique(sets, return_index=True)[1]).tolist()

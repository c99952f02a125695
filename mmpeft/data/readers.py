"""File formats -> rows: JSON, JSONL, CSV, parquet and imagefolders. It is the only module that uses `datasets`.

A reader yields (place, row), with a `DataError` in place of a row that it could not read.
"""

import csv
import difflib
import glob
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmpeft.errors import RefusedError

Place = int | str
"""Where a row stands in its file: its line, or "element 17" of a JSON array."""


class DataError(RefusedError):
    """A data set cannot be used; the message names file, line and id, what was found and what to do."""


def read_rows(path: Path) -> Iterator[tuple[Place, Any]]:
    """(place, row) of every row of a file that `find_files` gave; a `DataError` stands for an unreadable one."""
    return _READERS[path.suffix.lower()](path)


def find_files(path: Path) -> list[Path]:
    """The data files behind a path: itself, or those of a folder.

    Raises:
        DataError: There is no such file or folder, or nothing in it that can be read.
    """
    if path.is_dir():
        files = [path / name for name in ("metadata.jsonl", "metadata.csv") if (path / name).is_file()]
        files = files or sorted(path.glob("*.parquet"))
        if not files or len({file.suffix for file in files}) > 1:
            raise DataError(
                f"{path} holds {sorted(os.listdir(path))[:10]}; wanted metadata.jsonl, metadata.csv (one of "
                "them) or parquet files"
            )
        return files
    if not path.is_file():
        beside = os.listdir(path.parent) if path.parent.is_dir() else []
        seen_from = "" if path.is_absolute() else f", seen from {Path.cwd()}"
        close = difflib.get_close_matches(path.name, beside, n=3)
        raise DataError(
            f"{str(path)!r} is neither a file nor a folder{seen_from}; closest names in {str(path.parent)!r}: {close}; "
            "a hub data set must be downloaded first"
        )
    if path.suffix.lower() not in _READERS:
        raise DataError(f"{path} ends in {path.suffix!r}; wanted one of {sorted(_READERS)}, or a folder")
    return [path]


def _read_json(path: Path) -> Iterator[tuple[Place, Any]]:
    data = path.read_bytes()
    start = 3 if data.startswith(b"\xef\xbb\xbf") else 0
    if data[start:].lstrip()[:1] == b"[":
        yield from _read_array(data, start)
        return
    if refused := _object_over_lines(data[start:].decode(errors="replace"), start):
        yield refused
        return
    for number, line in enumerate(data[start:].split(b"\n"), 1):
        if line and not line.isspace():
            try:
                yield number, _DECODER.decode(line.decode())
            except (ValueError, RecursionError) as error:
                yield number, _json_error(error, start)
        start += len(line) + 1


def _read_array(data: bytes, start: int) -> Iterator[tuple[Place, Any]]:
    """The elements of one JSON array, numbered from 1; of an array that is not valid the line of its fault."""
    try:
        text = data[start:].decode()
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = data.count(b"\n", 0, start + error.start) + 1 if isinstance(error, UnicodeDecodeError) else 1
        yield getattr(error, "lineno", line), _json_error(error, start)
        return
    constants = "NaN" in text or "Infinity" in text  # perhaps inside of a text: each row is read again
    for number, row in enumerate(rows, 1):
        try:
            yield f"element {number}", _DECODER.decode(json.dumps(row)) if constants else row
        except RefusedError as error:
            yield f"element {number}", _json_error(error, start)


def _object_over_lines(text: str, start: int) -> tuple[Place, DataError] | None:
    """(line, what to say) of a file that begins with an object of several lines, none of which is a row."""
    begin = len(text) - len(text.lstrip())
    try:
        found, end = json.JSONDecoder().raw_decode(text, begin)
    except (ValueError, RecursionError) as error:
        alone = text[begin:].partition("\n")[0].strip() == "{"
        return (getattr(error, "lineno", 1), _json_error(error, start)) if alone else None
    if not (breaks := text.count("\n", begin, end)):
        return None
    return text.count("\n", 0, begin) + 1, DataError(
        f"found one object over {breaks + 1} lines with the keys {list(found)[:10]}; wanted an array of objects, or "
        "one object a line: put [ ] around it, or write the list that holds the rows into a file of its own"
    )


def _json_error(error: Exception, start: int) -> DataError:
    """The error in words; `start` is the byte at which the text that was being read begins."""
    if isinstance(error, UnicodeDecodeError):
        return DataError(f"not UTF-8 at byte {start + error.start}; save the file as UTF-8")
    if isinstance(error, json.JSONDecodeError):
        offset = start + len(error.doc[: error.pos].encode())
        fault = error.msg.replace("Expecting", "expected").replace(
            "Extra data", "something follows the value"
        )
        return DataError(f"not valid JSON at byte {offset}: {fault}; wanted an array or one object a line")
    return DataError(f"not valid JSON: {error}")


def _refuse_constant(name: str) -> None:
    raise RefusedError(f"found {name}, which JSON does not have; write null or a number")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _read_csv(path: Path) -> Iterator[tuple[Place, Any]]:
    """Rows with the line they end on; an empty cell counts as absent."""
    line = 1
    try:
        reader = csv.DictReader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline=""), strict=True)
        for row in reader:
            line = reader.line_num
            if None in row or None in row.values():
                yield line, DataError(f"wanted one field for each of {reader.fieldnames}; add quotes?")
            else:
                yield line, {key: value or None for key, value in row.items()}
    except UnicodeDecodeError as error:
        yield line, _json_error(error, 0)
    except csv.Error as error:
        yield line + 1, DataError(f"not valid CSV: {error}")


def _read_parquet(path: Path) -> Iterator[tuple[Place, Any]]:
    """Rows numbered from 1. Streamed, so that no second copy lands in the cache of `datasets`."""
    from datasets import load_dataset

    line = 0
    try:
        rows = load_dataset("parquet", data_files=[glob.escape(str(path))], split="train", streaming=True)
        for line, row in enumerate(rows.decode(False), 1):
            yield line, row
    except Exception as error:  # pyarrow raises many types on damaged files
        yield line + 1, DataError(f"not readable as parquet ({error}); write the file again")


_READERS = {
    ".json": _read_json,
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}

"""CSV and its kin -> rows: delimiters told from the content, UTF-8 or any encoding with a byte order mark."""

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmpeft.data.formats.base import DataError, Rows
from mmpeft.data.formats.json_text import not_utf8
from mmpeft.data.formats.streams import open_utf8
from mmpeft.data.image_names import is_image_name

DELIMITERS = ",;\t|"
LOOKED_AT = 20
"""Rows that tell the delimiter where the header alone does not."""
WIDEST_CELL = 2**31 - 1
"""What csv's own limit of 131,072 characters is raised to: a report or a base64 image is longer."""
WIDEST_NAME = 64
CAPTION_NUMBER = re.compile(r"#\d+$")
"""Behind an image's name: which of its captions it is."""


def table_rows(path: Path) -> Rows:
    """Rows with the line they end on; an empty cell counts as absent."""
    csv.field_size_limit(WIDEST_CELL)
    line = 1
    try:
        header, rows = _header_and_rows(path)
        for line, cells in rows:
            yield line, _row(header, cells)
    except UnicodeDecodeError:
        yield line, _first_fault(path)
    except csv.Error as error:
        yield line + 1, DataError(f"not valid CSV: {error}")
    except DataError as error:
        yield 1, error


def _header_and_rows(path: Path) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    delimiter = _delimiter(path)
    rows = ((line, cells) for line, cells in _cells(path, delimiter) if cells)
    _, header = next(rows, (1, []))
    if _is_caption_list(header, delimiter):
        return ["image", "text"], _captions(path)
    header = [name.strip() for name in header]
    if header and header[0] == "":  # pandas writes the number of a row into a column without a name
        rows, header = _without_index(rows), header[1:]
    if no_name := [
        name for name in header if len(name) > WIDEST_NAME or len(name.split()) > 4 or _names_image(name)
    ]:
        raise DataError(
            f"its first line holds {no_name[0]!r:.60}, which is no name of a column; write a first line such as "
            f"{delimiter.join(['image', 'text'])!r}"
        )
    if len(header) == 1:
        raise DataError(
            f"found the only column {header[0]!r:.60}; wanted columns separated by one of {list(DELIMITERS)}, whose "
            "names are the first line"
        )
    if twice := [name for name in header if header.count(name) > 1 or not name]:
        raise DataError(
            f"the column {twice[0]!r} is in {header} more than once or has no name; name each once"
        )
    return header, rows


def _row(header: list[str], cells: Any) -> Any:
    if isinstance(cells, DataError):
        return cells
    if len(cells) != len(header):
        return DataError(f"wanted one field for each of {header}; found {len(cells)}: add quotes?")
    return {name: cell or None for name, cell in zip(header, cells, strict=True)}


def _cells(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    with open_utf8(path) as (stream, _), io.TextIOWrapper(stream, "utf-8", newline="") as text:
        reader = csv.reader(text, delimiter=delimiter, strict=True, skipinitialspace=delimiter == "|")
        for cells in reader:
            yield reader.line_num, [cell.strip() for cell in cells] if delimiter == "|" else cells


def _delimiter(path: Path) -> str:
    """The one that the header holds; of several the one that parts all rows alike."""
    with open_utf8(path) as (stream, _), io.TextIOWrapper(stream, "utf-8", newline="") as text:
        first = next((line for line in text if line.strip()), "")
    there = [delimiter for delimiter in DELIMITERS if delimiter in first]
    if path.name.lower().removesuffix(".gz").endswith(".tsv") and "\t" in there:
        return "\t"
    if len(there) < 2:
        return there[0] if there else ","
    alike = [delimiter for delimiter in there if len(_widths(path, delimiter)) == 1]
    if len(alike) != 1:
        raise DataError(
            f"its first line is {first.strip()!r:.80}: cannot tell which of {there} parts its columns"
        )
    return alike[0]


def _widths(path: Path, delimiter: str) -> set[int]:
    """How many cells the first rows have."""
    widths: set[int] = set()
    try:
        for number, (_, cells) in enumerate(_cells(path, delimiter)):
            widths |= {len(cells)} if cells else set()
            if number == LOOKED_AT:
                break
    except csv.Error:
        return set()
    return {0, 1} if 1 in widths else widths


def _is_caption_list(header: list[str], delimiter: str) -> bool:
    """Whether a table without names is an image and its caption in each line, as Flickr8k.token.txt is."""
    return delimiter == "\t" and len(header) == 2 and _names_image(header[0]) and " " in header[1].strip()


def _names_image(cell: str) -> bool:
    return is_image_name(CAPTION_NUMBER.sub("", cell))


def _captions(path: Path) -> Iterator[tuple[int, Any]]:
    for line, cells in _cells(path, "\t"):
        if len(cells) == 2 and _names_image(cells[0]):
            yield line, [CAPTION_NUMBER.sub("", cells[0]), cells[1]]
        elif cells:
            yield line, DataError(f"found {cells!r:.80}; wanted an image's name, a tab and its caption")


def _without_index(rows: Iterator[tuple[int, list[str]]]) -> Iterator[tuple[int, Any]]:
    for number, (line, cells) in enumerate(rows):
        if cells[0] == str(number):
            yield line, cells[1:]
        else:
            yield (
                line,
                DataError(f"the first column has no name and holds {cells[0]!r:.60}, not {number}; name it"),
            )


def _first_fault(path: Path) -> DataError:
    with open_utf8(path) as (stream, start):
        for line in stream:
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return not_utf8(start + error.start)
            start += len(line)
    return DataError("cannot be decoded; save the file as UTF-8")

"""JSON and JSONL -> rows: an array, one object a line, objects over several lines one after the other, or a document.

Which of them a file is, its content says and not its ending. A file of one object that holds the rows in a list or by
their ids (`documents.py`) is a document; only where its ending promises an object a line, one line is one row.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmpeft.data.formats.base import DataError, Place, Rows
from mmpeft.data.formats.documents import Document, document_rows, outline_of
from mmpeft.data.formats.json_text import JsonText, JsonTextError, RowDecoder, json_error
from mmpeft.data.formats.splits import of_split
from mmpeft.data.formats.streams import ending, open_utf8

LINES = (".jsonl", ".ndjson")
"""Endings of files that hold one object a line."""


def json_rows(path: Path, require_answers: bool = True, wanted: str | None = None) -> Rows:
    """(place, row) of every row.

    Args:
        wanted: the key of a document's list whose entries are meant, or the split of the rows that are.
    """
    with json_text(path) as text:
        first = text.peek()
        if first == "[":
            yield from of_split(_in_array(text), wanted, path)
            return
        if first != "{":
            yield from of_split(_in_lines(path), wanted, path)
            return
        begin = text.line
        try:
            outline = outline_of(text)
            ended, alone = text.line, not text.peek()
        except JsonTextError as fault:
            if fault.line > begin and _opens_alone(path, begin):
                yield fault.line, fault.error
            else:
                yield from _in_lines(path)
            return
    is_row = ended == begin and ending(path) in LINES
    if alone and outline.is_document and not is_row:
        yield from _documents([Document(path, outline, json_text)], require_answers, wanted)
    else:
        yield from of_split(_in_lines(path) if ended == begin else _in_sequence(path), wanted, path)


def pair_rows(paths: list[Path], require_answers: bool, wanted: str | None) -> Rows:
    """The rows of documents that belong together, such as questions and their annotations."""
    documents = []
    for path in paths:
        with json_text(path) as text:
            try:
                outline = outline_of(text)
            except JsonTextError as fault:
                yield f"{path.name}:{fault.line}", fault.error
                return
        if outline.is_by_id or not outline.is_document:
            yield (
                path.name,
                DataError("no list of objects in it; wanted documents such as questions and annotations"),
            )
            return
        documents.append(Document(path, outline, json_text))
    yield from _documents(documents, require_answers, wanted)


def _documents(documents: list[Document], require_answers: bool, wanted: str | None) -> Rows:
    """The rows of documents; what is wanted of them is a split of its rows, unless it is a key of theirs."""
    path = documents[0].path
    is_key = wanted is not None and any(document.has(wanted) for document in documents)
    rows = document_rows(documents, require_answers, wanted if is_key else None)
    yield from of_split(rows, None if is_key else wanted, path)


@contextmanager
def json_text(path: Path) -> Iterator[JsonText]:
    with open_utf8(path) as (stream, start):
        yield JsonText(stream, start)


def _in_array(text: JsonText) -> Rows:
    """The elements, numbered from 1; of an array that is not valid also the line of its fault."""
    try:
        for number, _ in enumerate(text.items("["), 1):
            yield f"element {number}", text.value()
        text.end()
    except JsonTextError as fault:
        yield fault.line, fault.error


def _in_sequence(path: Path) -> Rows:
    """Objects that may each have several lines, by the line on which each begins."""
    with json_text(path) as text:
        try:
            while text.peek():
                yield text.line, text.value()
        except JsonTextError as fault:
            yield fault.line, fault.error


def _in_lines(path: Path) -> Rows:
    decoder = RowDecoder()
    with open_utf8(path) as (stream, start):
        for number, line in enumerate(stream, 1):
            if not line.isspace():
                yield number, _row(decoder, line.rstrip(b"\n"), start)
            start += len(line)


def _row(decoder: RowDecoder, line: bytes, start: int) -> Any:
    try:
        return decoder.decode(line.decode())
    except (ValueError, RecursionError) as error:
        return json_error(error, start)


def _opens_alone(path: Path, line: Place) -> bool:
    """Whether the object that begins on a line is written over several, not cut: the next line is no object."""
    with open_utf8(path) as (stream, _):
        following = next((text for number, text in enumerate(stream, 1) if number == int(line) + 1), b"")
    return not following.startswith(b"{")

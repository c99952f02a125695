"""From every accepted data format to one record. It is the only module that uses `datasets`.

A file is read row by row (`_read_*`: a row, or the `DataError` found in its place), then each row becomes a
`Record`. All problems of a file are collected and raised as one `DataError`, so that one run shows them all.

`<image>` markers: the questions of a record hold exactly one per image, in the order of `images`; template
code replaces them by image spans. A row without markers gets them in front of its first question. Questions
lose outer whitespace, also that between their text and markers at either end ("<image>\\nWhat?" becomes
"<image>What?"). A record's only marker moves from the end of its question to the front. Answers are kept as
they are.
"""

import csv
import difflib
import glob
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from mmpeft.data.images import ImageError, load_image

MARKER = "<image>"
CAPTION_INSTRUCTION = "Describe this image."
"""The question of a caption row ({image, text}) without an `instruction`."""
MAX_LISTED = 20
"""Most problems written out in one error; the rest is counted."""
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
SHAPES = (
    "{image | images, conversations: [{from, value}]}, {images, messages: [{role, content}]}, "
    "{image | file_name, question, answer} or {image | file_name, text}"
)


class DataError(ValueError):
    """A data set cannot be used; the message names file, line and id, what was found and what to do."""


class Record(TypedDict):
    """One sample, whatever format it came from."""

    id: str
    images: list[str | bytes]
    """Absolute paths inside the image root, or encoded bytes (parquet)."""
    turns: list[tuple[str, str | None]]
    """(question, answer); only the last answer can be None, and only for prediction."""
    task: str | None
    choices: NotRequired[list[str]]
    """The allowed answers, if the row lists them."""
    where: str
    """File and line (parquet: row), e.g. "train.jsonl:12"."""


def load_records(
    path: str | Path,
    *,
    image_root: str | Path | None = None,
    task: str | None = None,
    require_answers: bool = True,
) -> list[Record]:
    """All records of a JSON, JSONL, CSV or parquet file, or of an imagefolder.

    Args:
        path: A file, or a folder with `metadata.jsonl`, `metadata.csv` or parquet files.
        image_root: Folder that image names are relative to and must stay in; default: the file's folder.
        task: Task of the rows that have no `task` themselves.
        require_answers: False for prediction: the last turn of a row may lack its answer.

    Raises:
        DataError: If a row is not a valid sample, two rows share an id, or there is no row. Whether the image
            files exist is not looked at: see `check_images`.
    """
    files = _find_files(Path(path))
    root = Path(image_root) if image_root is not None else files[0].parent
    if not root.is_dir():
        raise DataError(f"image_root {str(root)!r} is not a folder; pass the one image names are relative to")
    images = _ImageRoot(root)
    records, problems, seen = [], [], {}
    for file in files:
        for line, row in READERS[file.suffix.lower()](file):
            where = f"{file.name}:{line}"
            try:
                record = _record(row, f"{file.stem}-{line}", where, images, task, require_answers)
                first = seen.setdefault(record["id"], where)
                if first is not where:
                    raise DataError(f"the id is also used at {first}; make ids unique, or drop them all")
                records.append(record)
            except DataError as error:
                name = f" (id {row['id']!r})" if isinstance(row, dict) and row.get("id") is not None else ""
                problems.append(f"{where}{name}: {error}")
    if problems:
        rest = f"\n  and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
        raise DataError("\n  ".join([f"{path}: {len(problems)} problem(s)", *problems[:MAX_LISTED]]) + rest)
    if not records:
        raise DataError(f"{path} holds no rows; wanted at least one sample")
    return records


def check_images(records: list[Record], *, decode: bool = False) -> list[str]:
    """One line for every image that is missing or empty or, with `decode`, cannot be decoded.

    Each path is looked at once, however many records name it.
    """
    problems, seen = [], set()
    for record in records:
        for image in record["images"]:
            if isinstance(image, str) and image in seen:
                continue
            if problem := _problem(image, decode):
                problems.append(f"{record['where']} (id {record['id']!r}): {problem}")
            if isinstance(image, str):
                seen.add(image)
    return problems


def _problem(image: str | bytes, decode: bool) -> str | None:
    if decode:
        try:
            load_image(image)
        except ImageError as error:
            return str(error)
    elif isinstance(image, str) and not (os.path.isfile(image) and os.path.getsize(image)):
        return (
            f"image {image!r} is missing, empty or no file; correct its name or image_root, or drop the row"
        )
    return None


# Files to rows: each reader yields (line, row), with a DataError in place of a row it could not read.


def _find_files(path: Path) -> list[Path]:
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
        close = difflib.get_close_matches(path.name, beside, n=3)
        raise DataError(
            f"{str(path)!r} is neither a file nor a folder; closest names in {str(path.parent)!r}: {close}; "
            "a hub data set must be downloaded first"
        )
    if path.suffix.lower() not in READERS:
        raise DataError(f"{path} ends in {path.suffix!r}; wanted one of {sorted(READERS)}, or a folder")
    return [path]


def _read_json(path: Path) -> Iterator[tuple[int, Any]]:
    data = path.read_bytes()
    start = 3 if data.startswith(b"\xef\xbb\xbf") else 0
    if data[start:].lstrip()[:1] == b"[":
        yield from _read_array(data, start)
        return
    for number, line in enumerate(data[start:].split(b"\n"), 1):
        if line and not line.isspace():
            try:
                yield number, _DECODER.decode(line.decode())
            except (ValueError, RecursionError) as error:
                yield number, _json_error(error, start)
        start += len(line) + 1


def _read_array(data: bytes, start: int) -> Iterator[tuple[int, Any]]:
    """The elements of one JSON array, each with the line it begins on."""
    line = 1
    try:
        text = data[start:].decode()
        position = _skip_space(text, text.index("[") + 1)
        counted, closed = 0, text[position : position + 1] == "]"
        while not closed:
            line += text.count("\n", counted, position)
            counted = position
            row, end = _DECODER.raw_decode(text, position)
            yield line, row
            position = _skip_space(text, end)
            closed = text[position : position + 1] == "]"
            if not closed:
                if text[position : position + 1] != ",":
                    raise json.JSONDecodeError("expected ',' or ']' after an element", text, position)
                position = _skip_space(text, position + 1)
        position = _skip_space(text, position + 1)
        if position < len(text):
            raise json.JSONDecodeError("something follows the array", text, position)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError):
            line = error.lineno
        elif isinstance(error, UnicodeDecodeError):
            line = data.count(b"\n", 0, start + error.start) + 1
        yield line, _json_error(error, start)


def _skip_space(text: str, position: int) -> int:
    while text[position : position + 1].isspace():
        position += 1
    return position


def _json_error(error: Exception, start: int) -> DataError:
    """The error in words; `start` is the byte at which the text that was being read begins."""
    if isinstance(error, UnicodeDecodeError):
        return DataError(f"not UTF-8 at byte {start + error.start}; save the file as UTF-8")
    if isinstance(error, json.JSONDecodeError):
        offset = start + len(error.doc[: error.pos].encode())
        return DataError(
            f"not valid JSON at byte {offset}: {error.msg}; wanted an array or one object a line"
        )
    return DataError(f"not valid JSON: {error}")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"found {name}, which JSON does not have; write null or a number")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _read_csv(path: Path) -> Iterator[tuple[int, Any]]:
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


def _read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    """Rows numbered from 1. Streamed, so that no second copy lands in the cache of `datasets`."""
    from datasets import load_dataset

    line = 0
    try:
        rows = load_dataset("parquet", data_files=[glob.escape(str(path))], split="train", streaming=True)
        for line, row in enumerate(rows.decode(False), 1):
            yield line, row
    except Exception as error:  # pyarrow raises many types on damaged files
        yield line + 1, DataError(f"not readable as parquet ({error}); write the file again")


READERS = {
    ".json": _read_json,
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


# Rows to records.


class _ImageRoot:
    """Turns image names into absolute paths and refuses those that lead out of one folder.

    Every name and every folder is resolved once: 40,000 rows in a few folders cost one `lstat` per name.
    """

    def __init__(self, root: Path) -> None:
        self._root = os.path.realpath(root)
        self._inside = os.path.join(self._root, "")
        self._folders: dict[str, str] = {}
        self._paths: dict[str, str] = {}

    def resolve(self, name: str) -> str:
        if name not in self._paths:
            self._paths[name] = self._resolve(_text(name, "image name"))
        return self._paths[name]

    def _resolve(self, name: str) -> str:
        if not name.strip() or "\0" in name or name.startswith(("http://", "https://", "data:")):
            raise DataError(f"found the image {_short(name)}; wanted a local path; download URLs first")
        folder, base = os.path.split(os.path.join(self._root, name))
        if folder not in self._folders:
            self._folders[folder] = os.path.realpath(folder)
        path = os.path.join(self._folders[folder], base)
        if base in ("", ".", "..") or os.path.islink(path):
            path = os.path.realpath(path)
        if not path.startswith(self._inside):
            raise DataError(
                f"image {name!r} leads to {path}, outside the image root {self._root}; "
                "move the file inside, or pass the folder that holds all images as image_root"
            )
        return path


def _record(
    row: Any, made_id: str, where: str, root: _ImageRoot, task: str | None, require_answers: bool
) -> Record:
    if isinstance(row, DataError):
        raise row
    if not isinstance(row, dict):
        raise DataError(f"found a {type(row).__name__}; wanted an object: {SHAPES}")
    row = {key: value for key, value in row.items() if value is not None}
    turns, inline = _turns(row, require_answers)
    named = [key for key in ("image", "images", "file_name") if key in row] + ["messages"] * bool(inline)
    if len(named) > 1:
        raise DataError(f"images are given more than once, under {named}; keep one of them")
    given = inline or (row[named[0]] if named else [])
    images = [_image(image, root) for image in (given if isinstance(given, list) else [given])]
    record = Record(
        id=_id(row.get("id", made_id)),
        images=images,
        turns=_place_markers(turns, len(images)),
        task=_text(row["task"], "task") if "task" in row else task,
        where=where,
    )
    if "choices" in row:
        record["choices"] = [_text(choice, "choices") for choice in _list(row["choices"], "choices")]
    return record


def _turns(row: dict, require_answers: bool) -> tuple[list[tuple[str, str | None]], list]:
    """The (question, answer) pairs as written, and the images named inside message parts."""
    inline: list = []
    for shape, role, text in (("conversations", "from", "value"), ("messages", "role", "content")):
        if shape in row:
            turns = [_role_text(turn, role, text, inline) for turn in _list(row[shape], shape)]
            return _pairs(turns, require_answers), inline
    if "question" in row:
        question, answer = row["question"], row.get("answer")
    elif "text" in row or "instruction" in row:
        question, answer = row.get("instruction", CAPTION_INSTRUCTION), row.get("text")
    else:
        raise DataError(f"found the keys {sorted(row)}; wanted one of {SHAPES}")
    turns = [("user", _text(question, "question"))]
    if answer is not None:
        turns.append(("assistant", _text(answer, "answer")))
    return _pairs(turns, require_answers), inline


def _role_text(turn: Any, role_key: str, text_key: str, inline: list) -> tuple[str, str]:
    """Role and text of one turn; images named in its parts are appended to `inline`."""
    role = turn.get(role_key) if isinstance(turn, dict) else None
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(
            f"found the turn {_short(turn)}; wanted {role_key}: user or assistant, {text_key}: text"
        )
    content = turn.get(text_key)
    if text_key == "content" and isinstance(content, list):
        content = "".join([_part_text(part, inline) for part in content])
    return ROLES[role], _text(content, text_key)


def _part_text(part: Any, inline: list) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        return _text(part.get("text"), "text part")
    if kind not in ("image", "image_url"):
        raise DataError(f"found the part {_short(part)}; wanted {{type: text, text}} or {{type: image}}")
    sources = [part[key] for key in ("image", "image_url", "url", "path") if part.get(key) is not None]
    inline += sources[:1]
    return MARKER


def _pairs(turns: list[tuple[str, str]], require_answers: bool) -> list[tuple[str, str | None]]:
    for number, (role, text) in enumerate(turns, 1):
        wanted = "user" if number % 2 else "assistant"
        if role == "system":
            raise DataError("found a system turn; put its text into the template or the first question")
        if role != wanted:
            raise DataError(f"turn {number} is from the {role}; wanted the {wanted} (in turns, user first)")
        if role == "assistant" and (MARKER in text or not text.strip()):
            fault = f"holds {MARKER}" if MARKER in text else "is empty or only whitespace"
            raise DataError(f"turn {number}, an answer, {fault}; correct it or drop the row")
    texts: list = [text for _, text in turns]
    if len(texts) % 2:
        if require_answers:
            raise DataError("the last question has no answer; add it (only prediction takes rows without)")
        texts.append(None)
    return list(zip(texts[::2], texts[1::2], strict=True))


def _place_markers(turns: list[tuple[str, str | None]], num_images: int) -> list[tuple[str, str | None]]:
    """The turns with one marker per image, as told at the top of this module."""
    found = sum(question.count(MARKER) for question, _ in turns)
    if found == 0:
        turns = [(MARKER * num_images + turns[0][0].strip(), turns[0][1]), *turns[1:]]
    elif found != num_images:
        raise DataError(
            f"found {found} {MARKER} for {num_images} image(s); wanted one {MARKER} each, or none"
        )
    placed = [(_tidy(question, found == 1), answer) for question, answer in turns]
    if not all(question for question, _ in placed):
        raise DataError("a question is empty; write one or drop the row")
    return placed


def _tidy(question: str, single: bool) -> str:
    parts = question.split(MARKER)
    filled = [number for number, part in enumerate(parts) if part.strip()]
    if not filled:
        return MARKER * (len(parts) - 1)
    front, back = filled[0], len(parts) - 1 - filled[-1]
    text = MARKER.join(parts[filled[0] : filled[-1] + 1]).strip()
    return MARKER * (front + back) + text if single else MARKER * front + text + MARKER * back


def _image(image: Any, root: _ImageRoot) -> str | bytes:
    """The absolute path or the bytes behind a name, {bytes, path} (parquet) or {url} (message part)."""
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path") or image.get("url")
    if isinstance(image, bytes) and image:
        return image
    if isinstance(image, str):
        return root.resolve(image)
    raise DataError(f"found the image {_short(image)}; wanted a file name, or bytes that are not empty")


def _id(value: Any) -> str:
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else _text(value, "id")
    if not text.strip():
        raise DataError("the id is empty; write one, or leave the key out")
    return text


def _list(value: Any, name: str) -> list:
    if not isinstance(value, list) or not value:
        raise DataError(f"{name} is {_short(value)}; wanted a list that is not empty")
    return value


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name} is {_short(value)}; wanted text")
    try:
        if not value.isascii():
            value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{name} holds a lone surrogate at character {error.start}; repair it") from None
    return value


def _short(value: Any) -> str:
    return f"{type(value).__name__} {value!r:.80}"

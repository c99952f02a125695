"""The good rows of data sets as one JSONL file, and the others in a file beside it, each with its reason."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from mmpeft.data.formats import DataError
from mmpeft.data.hash_set import HashSet
from mmpeft.data.images.formats import format_of
from mmpeft.data.images.source import read_head
from mmpeft.data.layouts.columns import Columns
from mmpeft.data.records import ImageRoot, Record, RecordReader
from mmpeft.errors import RefusedError
from mmpeft.files import whole_file
from mmpeft.options import command_line

MEANT = ("images", "times", "turns", "system", "task", "choices", "references", "lists_captions")
"""What of a record a written row must be read as again."""


class CleanPart:
    """Every row that is written is read again first, and must mean the same.

    Args:
        out: the JSONL file, which is not there yet; ``NAME.quarantine.jsonl`` and the folder ``NAME.images``, of images
            that came as bytes, stand beside it.
        roots: of the images of all that is to be written.
        ignored: data.ignore; tags among them stay text.

    Raises:
        RefusedError: something is there already, or the name does not end in .jsonl.
    """

    def __init__(self, out: Path, roots: list[Path], ignored: list[str]):
        self.out = out
        self.quarantine, self.images = (out.with_suffix(end) for end in (".quarantine.jsonl", ".images"))
        if out.suffix != ".jsonl":
            raise RefusedError(f"--fix is {str(out)!r}; wanted the name of a new .jsonl file")
        if there := [path for path in (out, self.quarantine, self.images) if path.exists()]:
            raise RefusedError(f"--fix: {there[0]} is there already; name another file, or move it away")
        self._tags = [tag for tag in ignored if tag.startswith("<")]
        folder = os.path.realpath(out.parent)
        self._root = os.path.commonpath([folder, *map(os.path.realpath, roots)])
        self._relative = self._root == folder
        self._reader = RecordReader(ImageRoot(Path(self._root)), columns=Columns({}, self._tags))
        self._ids = HashSet()
        self.written = self.set_aside = self.renamed = 0

    @contextmanager
    def open(self) -> Iterator["CleanPart"]:
        """Inside, rows are added; both files are written whole or not at all."""
        with ExitStack() as stack:
            paths = [stack.enter_context(whole_file(path, 0)) for path in (self.out, self.quarantine)]
            self._clean, self._bad = (
                stack.enter_context(path.open("w", encoding="utf-8", errors="backslashreplace"))
                for path in paths
            )
            yield self

    def add(self, row: Any, where: str, records: list[Record], reason: str) -> None:
        """Writes a row's records, or sets it aside if there is a ``reason``."""
        rows = [] if reason else [self._row(record) for record in records]
        for record, made in zip(records, rows, strict=bool(rows)):
            reason = reason or self._not_the_same(record, made)
        if reason:
            self.set_aside += 1
            self._bad.write(_json({"where": where, "reason": reason, "row": _shown(row)}) + "\n")
            return
        for made in rows:
            made["id"] = self._own_id(made["id"])
            self._clean.write(_json(made) + "\n")
            self.written += 1

    def lines(self) -> list[str]:
        """What was written, and how it is read."""
        ignored = [f"--data.ignore={json.dumps(self._tags)}"] if self._tags else []
        root = [] if self._relative else [f"--data.image_root={self._root}"]
        renamed = f"; {self.renamed:,} ids that an earlier source has were counted on" if self.renamed else ""
        told = command_line("fit", f"--data.train={self.out}", *root, *ignored)
        return [
            f"{self.out}: {self.written:,} conversations{renamed}; read by {told}",
            f"{self.quarantine}: {self.set_aside:,} rows with reasons",
        ]

    def _row(self, record: Record) -> dict[str, Any]:
        turns = [
            {"role": role, "content": _content(text)}
            for turn in record["turns"]
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        said: dict[str, Any] = {"messages": turns, "answers": record.get("references")}
        if record.get("lists_captions"):
            said = {"instruction": record["turns"][0][0], "captions": record.get("references")}
        row = {
            "id": record["id"],
            "images": [self._name(image) for image in record["images"]],
            **said,
            "system": record.get("system"),
            "task": record["task"],
            "choices": record.get("choices"),
        }
        return {key: value for key, value in row.items() if value not in (None, [])}

    def _name(self, image: str | bytes) -> str:
        path = image if isinstance(image, str) else str(self._saved(image))
        return os.path.relpath(path, self._root) if self._relative else path

    def _saved(self, image: bytes) -> Path:
        digest = hashlib.sha256(image).hexdigest()[:32]
        path = Path(os.path.realpath(self.images)) / f"{digest}.{format_of(read_head(image)).lower()}"
        if not path.exists():
            with whole_file(path, len(image)) as unfinished:
                unfinished.write_bytes(image)
        return path

    def _not_the_same(self, record: Record, row: dict[str, Any]) -> str:
        """Why a row that was made of a record would be another one; "" if it is the same."""
        try:
            (again,) = self._reader.read(row, "", "")
        except DataError as error:
            return f"written as a row of ours it would be refused: {error}"
        names = [str(self._saved(image)) if isinstance(image, bytes) else image for image in record["images"]]
        wanted = {**record, "images": names}
        other = [key for key in MEANT if again.get(key) != wanted.get(key)]
        return f"written as a row of ours it would mean another {other[0]}" if other else ""

    def _own_id(self, name: str) -> str:
        """An id of this file alone: one that a row of an earlier source has is counted on."""
        own, times = name, 1
        while not self._ids.add(hash(own)):
            times += 1
            own = f"{name}#{times}"
        self.renamed += own != name
        return own


def _content(text: str | None) -> Any:
    return [{"type": "text", "text": text}] if text is not None and text.startswith("[{") else text


def _shown(row: Any) -> Any:
    return str(row) if isinstance(row, DataError) else row


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=lambda own: f"{type(own).__name__} {own!r:.80}")

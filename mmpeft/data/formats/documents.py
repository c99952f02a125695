"""Documents: one JSON object that holds rows in a list, in lists that refer to each other by ids, or by their ids.

COCO's captions, VQA's questions with their annotations, GQA's questions by id, R2Gen's lists by split. A document is
read twice, first its outline, then its rows one at a time: no more is held than what rows refer to.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmpeft.data.formats.base import DataError, Rows
from mmpeft.data.formats.join_by_id import Lists, joined
from mmpeft.data.formats.json_text import JsonText, JsonTextError
from mmpeft.data.formats.splits import canonical, choose_split, is_split
from mmpeft.data.image_names import is_image_name

ROW_LISTS = (
    *(
        "conversations",
        "conversation",
        "conversatons",
        "messages",
        "texts",
        "dialogue",
        "dialog",
        "history",
        "tools",
    ),
    *("answers", "choices", "options", "captions", "sentences", "chosen", "rejected", "prompt", "completion"),
    *("rejected_messages", "segments"),
)
"""Keys whose lists of objects are parts of one row."""
ABOUT_THE_FILE = (
    *("info", "license", "licenses", "version", "description", "url", "year", "contributor", "date_created"),
    *("data_type", "data_subtype", "task_type", "dataset", "dataset_name", "dataset_type", "dataset_version"),
    *("dataset_split", "split", "name", "author", "citation", "homepage", "language"),
)
"""Keys beside the rows that say nothing about any single one."""


@dataclass
class ListPart:
    """What a list of a document holds."""

    count: int = 0
    only_objects: bool = True
    first: dict = field(default_factory=dict)

    def add(self, value: Any) -> None:
        self.count += 1
        bad_row = isinstance(value, DataError) and bool(self.first)
        self.only_objects &= isinstance(value, dict) or bad_row
        if self.count == 1 and isinstance(value, dict):
            self.first = value


@dataclass
class Outline:
    """What one JSON object holds."""

    lists: dict[str, ListPart] = field(default_factory=dict)
    objects: list[str] = field(default_factory=list)
    """The keys of objects; of very many the first."""
    by_split: bool = True
    """Whether every object's key is a split's name."""
    nested: bool = True
    """Whether every object holds objects only."""
    others: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    """The keys that are names of images; of very many the first."""

    def row_lists(self) -> dict[str, ListPart]:
        """The lists of objects that may be rows."""
        return {
            name: part for name, part in self.lists.items() if part.only_objects and _may_be_rows(name, part)
        }

    @property
    def is_by_id(self) -> bool:
        """Whether its keys are those of rows: their ids, or the names of their images."""
        return bool(self.objects) != bool(self.images) and not self.lists and not self.others

    @property
    def is_document(self) -> bool:
        return self.is_by_id or any(part.count for part in self.row_lists().values())


@dataclass(frozen=True)
class Document:
    path: Path
    outline: Outline
    open: Callable[[Path], AbstractContextManager[JsonText]]

    def has(self, wanted: str) -> bool:
        """Whether it is the key of a list, or of rows by their ids of one split."""
        names = [*self.outline.lists, *(self.outline.objects if self.outline.by_split else ())]
        return any(canonical(name) == canonical(wanted) for name in names)

    def elements(self, name: str) -> Iterator[Any]:
        """The elements of one list, one at a time."""
        with self.open(self.path) as text:
            for key in text.items("{"):
                if key == name and text.peek() == "[":
                    for _ in text.items("["):
                        yield text.value()
                else:
                    text.value()

    def members(self) -> Iterator[tuple[str, Any]]:
        with self.open(self.path) as text:
            for key in text.items("{"):
                yield str(key), text.value()


def outline_of(text: JsonText) -> Outline:
    """Moves over an object.

    Raises:
        JsonTextError: it is not valid JSON.
    """
    outline = Outline()
    for key in text.items("{"):
        name = str(key)
        if is_image_name(name):
            text.value()
            outline.images += [name] * (len(outline.images) < 10)
        elif text.peek() == "[":
            if name in outline.lists:
                raise text.fault(f"the list {name!r} is given twice in one object", None)
            part = outline.lists[name] = ListPart()
            for _ in text.items("["):
                part.add(text.value())
        elif isinstance(value := text.value(), dict):
            outline.by_split &= is_split(name)
            outline.nested &= bool(value) and all(isinstance(item, dict) for item in value.values())
            if len(outline.objects) < 10:
                outline.objects.append(name)
        else:
            outline.others.append(name)
    return outline


def document_rows(documents: list[Document], require_answers: bool, pick: str | None) -> Rows:
    """The rows of one document, or of several that belong together. `pick` is the key of the rows that are meant, where
    the document has it.

    Raises:
        DataError: the document cannot be told.
    """
    path = documents[0].path
    try:
        if len(documents) == 1 and documents[0].outline.is_by_id:
            yield from _by_id(documents[0], pick)
            return
        lists = _lists(documents, pick)
        yield from joined(path, lists, require_answers)
    except DataError as error:
        yield "document", error
    except JsonTextError as fault:
        yield fault.line, fault.error


def _lists(documents: list[Document], pick: str | None) -> Lists:
    """The lists whose entries are rows, or that rows refer to."""
    lists: Lists = {}
    for document in documents:
        found = document.outline.row_lists()
        splits = [name for name in found if is_split(name)]
        if pick in found:
            found = {str(pick): found[str(pick)]}
        elif splits and len(splits) == len(found):
            name = choose_split(document.path, splits, pick)
            found = {name: found[name]}
        else:
            found = {name: part for name, part in found.items() if name not in ABOUT_THE_FILE}
            _refuse_further_keys(document, found)
        if twice := sorted(lists.keys() & found):
            raise DataError(f"{document.path.name} and another file both hold {twice[0]!r}; give one of each")
        for name, part in found.items():
            lists[name] = (part.first, lambda document=document, name=name: document.elements(name))
    return lists


def _refuse_further_keys(document: Document, found: dict[str, ListPart]) -> None:
    outline = document.outline
    given = [*outline.lists, *outline.objects, *outline.others, *outline.images]
    if further := [name for name in given if name not in found and name not in ABOUT_THE_FILE]:
        rows = max(found, key=lambda name: found[name].count, default="rows")
        raise DataError(
            f"found {further[:10]} beside the lists {sorted(found)}, and what they mean for the rows is not known; "
            f"take them out, or name the list that holds the rows: {document.path}:{rows}"
        )


def _by_id(document: Document, pick: str | None) -> Rows:
    """Rows whose keys are their ids, perhaps in an object for each split."""
    outline, wanted = document.outline, None
    if outline.by_split and outline.nested and outline.objects:
        wanted = choose_split(document.path, outline.objects, pick)
    for key, value in document.members():
        entries = {key: value} if wanted is None else value if key == wanted else {}
        for name, entry in entries.items():
            yield repr(name), _row_of(name, entry)


def _row_of(name: str, entry: Any) -> Any:
    """A row from its key, which may be its image's name, and what stands there: the row, or a caption or several."""
    if isinstance(entry, dict):
        if entry.keys() >= {"root", "annotation"}:
            return DataError(
                f"tells of a data file; name that, {entry['annotation']!r:.200}, and its image_root"
            )
        is_image = is_image_name(name) and not entry.keys() & {"image", "images", "file_name", "filename"}
        return {"image" if is_image else "id": name} | entry
    return {"image": name, "caption": entry} if is_image_name(name) else entry


def _may_be_rows(name: str, part: ListPart) -> bool:
    images = name == "images" and part.count > 0 and part.first.keys() <= {"bytes", "path", "url"}
    return name not in ROW_LISTS and not images

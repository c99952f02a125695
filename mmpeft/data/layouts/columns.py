"""Which column of a user's data is what: ``data.columns`` and ``data.ignore``, and the mapping that rows suggest."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmpeft.data.formats import DataError
from mmpeft.data.image_names import is_image_name
from mmpeft.data.layouts.names import MEANINGS, NAMES, closest, is_known, plain
from mmpeft.data.layouts.notes import Notes
from mmpeft.data.layouts.values import from_json, is_absent, short
from mmpeft.errors import RefusedError

PROPOSED = {"image": "image", "path": "image", "image id": "image", "label": "answer"} | {
    meaning: meaning
    for meaning in ("question", "answer", "answers", "choices", "caption", "conversations", "text")
}
"""Meaning of a column -> the key that a mapping would give it."""

OWN_NAMES = {names[0] for names in NAMES.values()} | {"images", "file_name", "messages", "instruction"}
"""Keys that are never proposed to be something else."""


class UnknownKeysError(DataError):
    """A row holds keys that are not understood; ``keys`` are they."""

    def __init__(self, keys: list[str], row: Mapping[str, Any], folder: str | None = None):
        """``folder`` is where images were looked for, of a row of which none was found."""
        super().__init__(_describe(keys, row, folder))
        self.keys = keys


@dataclass(frozen=True)
class Columns:
    """A user's own mapping.

    Raises:
        RefusedError: a key is not one that rows are read by, or a column is mapped and ignored.
    """

    mapping: Mapping[str, str] = field(default_factory=dict)
    """Our key -> the column that holds it."""
    ignored: Sequence[str] = ()
    """Columns that are left out, and tags that are text."""

    def __post_init__(self):
        for key, column in self.mapping.items():
            if not is_known(key):
                near = f"; the closest is {near!r}" if (near := closest(key)) else ""
                raise RefusedError(
                    f"data.columns maps {key!r}, which no row is read by{near}: write {{KEY: YOUR_COLUMN}}"
                )
            if not isinstance(column, str) or column in self.ignored:
                raise RefusedError(
                    f"data.columns gives {key} the column {column!r}; wanted one that is not ignored"
                )
        if twice := [column for column, count in Counter(self.mapping.values()).items() if count > 1]:
            raise RefusedError(f"data.columns gives the column {twice[0]!r} twice; a column is one thing")

    def apply(self, row: dict[str, Any], notes: Notes) -> dict[str, Any]:
        """The row under our keys.

        Raises:
            DataError: it has such a key already.
        """
        if not self.mapping and not self.ignored:
            return row
        found = {key: column for key, column in self.mapping.items() if not is_absent(row.get(column))}
        notes.mapped.update(found.values())
        notes.ignored.update(key for key in self.ignored if not is_absent(row.get(key)))
        rest = {k: v for k, v in row.items() if k not in self.ignored and k not in self.mapping.values()}
        for key, column in found.items():
            if not is_absent(rest.get(key)):
                raise DataError(
                    f"data.columns gives {key} the column {column!r}, but the row has {key!r} too; name that in "
                    "data.ignore, or map it as well"
                )
        return rest | {key: row[column] for key, column in found.items()}

    def missing(self, mapped: Counter[str]) -> list[str]:
        """Columns of the mapping that are in no row."""
        return [column for column in self.mapping.values() if not mapped[column]]

    def check_used(self, notes: Notes, where: str) -> None:
        """Raises:
        RefusedError: a column that is mapped is in no row.
        """
        if missing := self.missing(notes.mapped):
            raise RefusedError(f"data.columns maps {missing}, which no row of {where} has; correct the name")


def _describe(keys: list[str], row: Mapping[str, Any], folder: str | None) -> str:
    """What a row holds that is not understood, and what can be done about it."""
    told = [_described(key, row[key], folder) for key in keys]
    out = f"it out (data.ignore: [{', '.join(keys)}])"
    first = keys[0]
    near = MEANINGS.get(plain(closest(first) or ""), "")
    wanted = "image" if is_image_name(row[first]) else PROPOSED.get(near, "KEY")
    meant = {MEANINGS.get(plain(key)) for key in row if key not in keys}
    if MEANINGS.get(plain(first)) and (wanted == plain(first) or "conversations" in meant):
        return f"found {', '.join(told)}: not read beside the row's other keys; leave {out}"
    wanted = wanted if _fits(wanted, row[first]) else "KEY"
    return (
        f"found {', '.join(told)}: not understood in this row; say what it is (data.columns: {{{wanted}: {first}}}), "
        f"or leave {out}"
    )


def _fits(key: str, value: Any) -> bool:
    """Whether a value can be what stands under one of our keys."""
    value = from_json(value)
    if key in ("choices", "answers", "conversations"):
        return isinstance(value, list | dict)
    return key not in ("question", "caption", "text") or isinstance(value, str | list)


def propose_columns(rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The mapping that rows suggest, for `Columns`: key -> column, without those that have their own name already.

    Columns whose name is known come first, then those spelt like one, then those whose values are names of images.
    """
    found: dict[str, Any] = {}
    for row in rows:
        for column, value in row.items():
            if not is_absent(value):
                found.setdefault(column, value)
    own = {PROPOSED.get(MEANINGS[plain(column)]) for column in found.keys() & OWN_NAMES}
    proposed: dict[str, str] = {}
    for guess in (_known, _alike, _by_value):
        for column, value in found.items():
            key = guess(column, value)
            if key and key not in own | proposed.keys() and column not in {*OWN_NAMES, *proposed.values()}:
                proposed[key] = column
    return proposed


def _known(column: str, value: Any) -> str | None:
    return PROPOSED.get(MEANINGS.get(plain(column), ""))


def _alike(column: str, value: Any) -> str | None:
    near = closest(column)
    meant = PROPOSED.get(MEANINGS[plain(near)]) if near else None
    return meant if meant and _fits(meant, value) else None


def _by_value(column: str, value: Any) -> str | None:
    value = from_json(value)
    first = value[0] if isinstance(value, list) and value else value
    held = isinstance(first, bytes) or (isinstance(first, dict) and isinstance(first.get("bytes"), bytes))
    return "image" if held or is_image_name(first) else None


def _described(key: str, value: Any, folder: str | None) -> str:
    near = closest(key)
    if folder and MEANINGS.get(plain(key)) == "image id":
        hint = f", but no image of that name or number lies in {folder}: pass the folder that has it as image_root"
    elif is_image_name(value):
        hint = ", an image's name"
    elif near and plain(near) != plain(key) and _fits(PROPOSED.get(MEANINGS[plain(near)], ""), value):
        hint = f", closest to {near!r}"
    else:
        hint = ""
    return f"the key {key!r} ({short(value)}{hint})"

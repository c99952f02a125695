"""Splits of a data set: by the names of files and folders, or by a key of each row. One of several must be named."""

import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from mmpeft.data.formats.base import DataError, Rows
from mmpeft.data.key_names import plain

WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Hugging Face's split -> the words that mean it in names of files and folders."""
ALSO = ("restval", "minival", "testdev", "trainval")
"""Splits of public documents that mean no other."""
KEYS = ("split", "data_split", "set_name", "subset")
"""Keys of rows that name the split of each."""
ALWAYS = ("split", "datasplit")
"""Those of them, as plain names, whose every value is a split's; of the others only the words for one are."""
_PLACES = {plain(key): place for place, key in enumerate(KEYS)}
_SPLIT_OF = {word: split for split, words in WORDS.items() for word in words} | {word: word for word in ALSO}
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})", re.ASCII)
_WORD = re.compile(r"(?:^|[-._ 0-9])([a-z]+)(?=$|[-._ 0-9])")


def canonical(name: str) -> str:
    """A split's name as Hugging Face has it: "validation" for "val"."""
    return _SPLIT_OF.get(name.strip().lower(), name)


def is_split(name: object) -> bool:
    """Whether a text is a word for a split, as far as is known here."""
    return isinstance(name, str) and name.strip().lower() in _SPLIT_OF


def split_in_name(path: Path) -> str | None:
    """The split that a file's or folder's name tells: before "-00000-of-00002", else by a word in it."""
    stem = path.name.partition(".")[0] if not path.is_dir() else path.name
    if shard := _SHARD.fullmatch(stem):
        return canonical(shard[1])
    found = {_SPLIT_OF[word] for word in _WORD.findall(stem.lower()) if word in _SPLIT_OF}
    return found.pop() if len(found) == 1 else None


def choose_split(path: Path | str, there: Iterable[str], wanted: str | None) -> str:
    """The one of the splits that are there which is wanted, or the only one.

    Raises:
        DataError: none is named of several, or one that is not there.
    """
    names = sorted(there)
    if wanted is None and len(names) == 1:
        return names[0]
    same = [name for name in names if wanted is not None and canonical(name) == canonical(wanted)]
    if len(same) != 1:
        found = "none is named" if wanted is None else f"found {wanted!r}"
        raise DataError(f"{path} holds the splits {names}, {found}; name one of them: {path}:{names[0]}")
    return same[0]


def require_all_shards(files: list[Path]) -> None:
    """Raises:
    DataError: of "-00000-of-00003" files not all three are there.
    """
    shards = [match for file in files if (match := _SHARD.fullmatch(file.name.partition(".")[0]))]
    for name, number in sorted({(match[1], int(match[3])) for match in shards}):
        there = {int(match[2]) for match in shards if match[1] == name and int(match[3]) == number}
        if missing := sorted({*range(number)} - there):
            raise DataError(
                f"{files[0].parent} lacks {len(missing)} of the {number} shards of {name!r}, first "
                f"{name}-{missing[0]:05}-of-{number:05}; fetch them, or rename those that are there"
            )


def _split_named(row: object) -> str | None:
    """The split that a row names, as it is written; None where it names none."""
    if isinstance(row, dict):
        for key in _split_keys(tuple(row)):
            value = row[key]
            names_one = plain(key) in ALWAYS and isinstance(value, str | int) and str(value).strip()
            if names_one or is_split(value):
                return str(value).strip()
    return None


@lru_cache(1000)
def _split_keys(keys: tuple[str, ...]) -> list[str]:
    """Those of a row that may name its split, in the order of `KEYS`; rows of a file mostly have the same."""
    return sorted((key for key in keys if plain(key) in _PLACES), key=lambda key: _PLACES[plain(key)])


def of_split(rows: Rows, wanted: str | None, path: Path) -> Rows:
    """The rows of one split, by the key `split` of each.

    Rows of several splits of which none is wanted, and rows that name none beside some that do or where one is wanted,
    make one error.
    """
    names = {canonical(name) for name in wanted.split("+")} if wanted else set()
    seen: set[str | None] = set()
    for place, row in rows:
        if isinstance(row, DataError):
            yield place, row
            continue
        named = _split_named(row)
        seen.add(None if named is None else canonical(named))
        if names and named is None:
            yield place, DataError(f"names no split; wanted {wanted!r} in {KEYS[0]!r}; leave out :{wanted}")
            return
        if not names and len(seen) > 1:
            yield place, DataError(_of_another(path, named, seen))
            return
        if not names or canonical(str(named)) in names:
            yield place, row
    if missing := sorted(names - seen):
        yield "end", DataError(f"no row is of the split {missing[0]!r}; found {sorted(map(str, seen))}")


def _of_another(path: Path, named: str | None, seen: set[str | None]) -> str:
    if None in seen:
        this, others = (
            ("is of no split", "of one") if named is None else (f"is of the split {named!r}", "of none")
        )
        return f"{this}, rows above {others}; write the split into every row, or leave the key out"
    return f"is of the split {named!r}, rows above of another; name the one that is meant: {path}:{named}"

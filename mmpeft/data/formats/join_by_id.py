"""Lists of a document that refer to each other by ids -> rows: `annotations` with `image_id` and `question_id`, the
`images` and `questions` of these ids."""

import difflib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mmpeft.data.formats.base import DataError, Rows

Lists = dict[str, tuple[dict, Callable[[], Iterator[Any]]]]
"""A list's name -> its first entry, and all of them."""
ABOUT_IMAGES = {
    *("id", "width", "height", "license", "date_captured", "url"),
    *("coco_url", "flickr_url", "rights_holder", "licenses"),
}
"""Keys of an entry of `images` beside its file's name that say nothing about a question or a caption."""
MAY_BE_UNUSED = ("images", "categories")
HALVES = {"question": "annotation", "annotation": "question"}
ANSWERS = ("answer", "answers", "multiple_choice_answer")


def joined(path: Path, lists: Lists, require_answers: bool) -> Rows:
    """The rows of the one list that no other refers to, each with the keys of what it refers to.

    Raises:
        DataError: there is not one such list, or only questions or only annotations are there.
    """
    rows_of, parents = _relations(path, lists)
    if require_answers:
        _refuse_a_half(path, rows_of, lists)
    indices = {parent: _index(parent, key, lists[parent][1]()) for parent, (_, key) in parents.items()}
    used: dict[str, set] = {parent: set() for parent in parents if parent not in MAY_BE_UNUSED}
    for number, row in enumerate(lists[rows_of][1](), 1):
        try:
            for parent, (reference, _) in parents.items():
                row = _with(row, parent, reference, indices[parent])
                used.get(parent, set()).add(row.get(reference))
            if "images" in parents:  # which file it is, is told now
                row = {key: value for key, value in row.items() if key != parents["images"][0]}
        except DataError as error:
            row = error
        yield f"{rows_of} {number}", row
    for parent, seen in used.items():
        for name in [name for name in indices[parent] if name not in seen]:
            yield f"{parent} {name!r}", DataError(f"no entry of {rows_of} refers to it; add one or drop it")


def _relations(path: Path, lists: Lists) -> tuple[str, dict[str, tuple[str, str]]]:
    """The list of rows, and of the lists that it refers to the key that does, and the key of theirs that is meant."""
    found: dict[str, dict[str, tuple[str, str]]] = {name: {} for name in lists}
    for child, (entry, _) in lists.items():
        for parent, (other, _) in lists.items():
            reference = _singular(parent) + "_id"
            key = reference if reference in other else "id"
            if child != parent and reference in entry and key in other:
                found[child][parent] = (reference, key)
    left = [name for name in lists if not any(name in parents for parents in found.values())]
    if len(left) != 1 or len(found[left[0]]) != len(lists) - 1:
        raise DataError(
            f"found the lists {sorted(lists)}, which do not all belong to the entries of one by ids such as "
            f"'image_id'; name the one whose entries are the rows: {path}:{next(iter(lists), 'rows')}"
        )
    return left[0], found[left[0]]


def _singular(name: str) -> str:
    return name[:-3] + "y" if name.endswith("ies") else name.removesuffix("s")


def _index(parent: str, key: str, entries: Iterator[Any]) -> dict[Any, dict]:
    index: dict[Any, dict] = {}
    for number, entry in enumerate(entries, 1):
        name = entry.get(key) if isinstance(entry, dict) else None
        if not isinstance(name, str | int):
            raise DataError(f"entry {number} of {parent} has no {key!r} by which others refer to it")
        if name in index:
            raise DataError(f"two entries of {parent} have the {key} {name!r}; make it unique")
        drop = ABOUT_IMAGES if parent == "images" else {"id"}
        index[name] = {name: value for name, value in entry.items() if name not in drop}
    return index


def _with(row: Any, parent: str, reference: str, index: dict[Any, dict]) -> dict:
    if isinstance(row, DataError):
        raise row
    if not isinstance(row, dict) or row.get(reference) not in index:
        found = row.get(reference) if isinstance(row, dict) else row
        raise DataError(
            f"{reference} is {found!r:.80}, which is not among {parent}; add it there or drop the row"
        )
    entry = index[row[reference]]
    if different := [key for key in entry.keys() & row.keys() if entry[key] != row[key]]:
        raise DataError(
            f"{different[0]!r} is {row[different[0]]!r:.80}, but of {parent} {entry[different[0]]!r:.80}"
        )
    return entry | row


def _refuse_a_half(path: Path, rows_of: str, lists: Lists) -> None:
    keys = lists[rows_of][0].keys()
    if "question_id" not in keys:
        return
    if "question" in keys and not keys & {*ANSWERS}:
        here, wanted = "question", "answers"
    elif rows_of == "annotations" and not keys & {"question", "caption"} and "questions" not in lists:
        here, wanted = "annotation", "questions"
    else:
        return
    names = [
        file.name for file in path.parent.iterdir() if HALVES[here] in file.name.lower() and file.is_file()
    ]
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0)
    other = path.parent / near[0] if near else f"{HALVES[here]}s.json"
    raise DataError(f"found {here}s without their {wanted}; give both files: {path}+{other}")

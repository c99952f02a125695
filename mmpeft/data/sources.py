"""Data sets -> records: every accepted file and layout, validated, and whether the images are there.

A file is read row by row (`formats/`), a row is understood by its keys (`layouts/`) and becomes a `Record`
(`records.py`). All problems of a file are collected and raised as one `DataError`, so that one run shows them all.
"""

import os
from pathlib import Path
from typing import Literal

from mmpeft.data.formats import DataError, find_files, read_rows
from mmpeft.data.images import ImageError, load_image
from mmpeft.data.layouts.columns import Columns
from mmpeft.data.layouts.notes import Notes
from mmpeft.data.records import ImageRoot, Record, RecordReader

OnBadSample = Literal["raise", "skip"]
MAX_LISTED = 20
"""Most problems written out in one error; the rest is counted."""


def load_records(
    path: str | Path,
    columns: Columns | None = None,
    *,
    image_root: str | Path | None = None,
    task: str | None = None,
    require_answers: bool = True,
    on_bad_sample: OnBadSample = "raise",
    notes: Notes | None = None,
) -> list[Record]:
    """All records of a data file or folder of any format.

    Args:
        path: A file or folder as docs/data.md lists them, with ":split" behind it where it holds several.
        columns: The user's own mapping.
        image_root: Folder that image names are relative to and must stay in; default: the file's folder.
        task: Task of the rows that have no `task` themselves.
        require_answers: False for prediction: the last turn of a row may lack its answer.
        on_bad_sample: Whether a row that is not valid is an error, or is left out and counted.
        notes: Is told what was left out; who gives one checks `Columns.check_used`, as several data sets may share a
            mapping.

    Raises:
        DataError: If a row is not a valid sample, two rows share an id, or there is no row. Whether the image
            files exist is not looked at: see `check_images`.
    """
    files = find_files(path, require_answers)
    root = Path(image_root) if image_root is not None else files[0].root
    if not root.is_dir():
        raise DataError(f"image_root {str(root)!r} is not a folder; pass the one image names are relative to")
    told = Notes() if notes is None else notes
    columns = columns or Columns()
    reader = RecordReader(ImageRoot(root), task, require_answers, columns, told)
    records, problems, before = [], [], told.mapped.copy()
    for file in files:
        for place, row in read_rows(file):
            where = f"{file.name}:{place}"
            try:
                records += reader.read(row, f"{file.stem}-{place}", where)
            except DataError as error:
                name = f" (id {row['id']!r})" if isinstance(row, dict) and row.get("id") is not None else ""
                problems.append(f"{where}{name}: {error}")
    if on_bad_sample == "skip" and records:
        told.skipped += problems
    elif problems:
        rest = f"\n  and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
        missing = columns.missing(told.mapped - before)
        hint = f" (no row has {missing}, which data.columns maps)" if missing else ""
        raise DataError(
            "\n  ".join([f"{path}: {len(problems)} problem(s){hint}", *problems[:MAX_LISTED]]) + rest
        )
    if not records:
        raise DataError(f"{path} holds no rows; wanted at least one sample")
    if notes is None:
        columns.check_used(told, str(path))
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


def with_images(records: list[Record], notes: Notes) -> list[Record]:
    """The records whose images are there; ``notes`` are told of the others.

    Raises:
        DataError: none is left.
    """
    kept: list[Record] = []
    for record in records:
        problems = check_images([record])
        notes.skipped += problems
        kept += [] if problems else [record]
    if not kept:
        raise DataError(f"all {len(records):,} rows are bad; {notes.skipped[-1]}")
    return kept


def require_images(records: list[Record], what: str) -> None:
    """Raises:
    DataError: an image is missing or empty; ``what`` names the records, and the first problems are listed.
    """
    if problems := check_images(records):
        raise DataError(f"{what}: {len(problems)} images cannot be used\n" + "\n".join(problems[:MAX_LISTED]))


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

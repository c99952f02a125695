"""Data sets -> records: every accepted file and layout, validated, and whether the images are there.

A file is read row by row (`readers.py`), then each row becomes a `Record` (`records.py`) in a store (`store.py`). All
problems of a file are collected and raised as one `DataError`, so that one run shows them all.
"""

import os
import stat
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from mmpeft.data.images import ImageError, load_image
from mmpeft.data.kept_stores import read_or_open
from mmpeft.data.problems import MAX_LISTED, Problems
from mmpeft.data.readers import DataError, find_files, read_rows
from mmpeft.data.records import ImageRoot, Record, make_record, place_of
from mmpeft.data.store import RecordStore, StoreWriter, first_of_image_sets


def load_records(
    path: str | Path,
    *,
    image_root: str | Path | None = None,
    task: str | None = None,
    require_answers: bool = True,
) -> RecordStore:
    """All records of a JSON, JSONL, CSV or parquet file, or of an imagefolder.

    They lie in a `RecordStore`, of which each is made when it is asked for; of large files it is kept for the next
    start.

    Args:
        path: A file, or a folder with `metadata.jsonl`, `metadata.csv` or parquet files.
        image_root: Folder that image names are relative to and must stay in; default: the file's folder.
        task: Task of the rows that have no `task` themselves.
        require_answers: False for prediction: the last turn of a row may lack its answer.

    Raises:
        DataError: If a row is not a valid sample, two rows share an id, or there is no row. Whether the image
            files exist is not looked at: see `check_images`.
    """
    files = find_files(Path(path))
    root = Path(image_root) if image_root is not None else files[0].parent
    if not root.is_dir():
        raise DataError(f"image_root {str(root)!r} is not a folder; pass the one image names are relative to")
    make = partial(make_record, task=task, require_answers=require_answers)

    def read(writer: StoreWriter, images: ImageRoot) -> RecordStore:
        return _read(path, files, writer, partial(make, root=images))

    settings = {"task": task, "require_answers": require_answers}
    return read_or_open(files, root, settings, read)


def _read(
    path: str | Path, files: list[Path], writer: StoreWriter, make: Callable[..., Record]
) -> RecordStore:
    """Every row of the files as a record; a problem of one leaves the others to be looked at."""
    problems, ids, places = Problems(), array("q"), array("q")
    row_number = 0
    for file in files:
        for place, row in read_rows(file):
            where = f"{file.name}:{place}"
            row_number += 1
            try:
                record = make(row, f"{file.stem}-{place}", where)
            except DataError as error:
                name = f" (id {row['id']!r})" if isinstance(row, dict) and row.get("id") is not None else ""
                problems.add(row_number, f"{where}{name}: {error}")
            else:
                writer.add(record)
                ids.append(hash(record["id"]))
                places.append(row_number)
    records = writer.records()
    for number, first in _repeated(records, ids):
        told = f"the id is also used at {records[first]['where']}; make ids unique, or drop them all"
        problems.add(places[number], f"{place_of(records[number])}: {told}")
    problems.refuse(str(path))
    if not records:
        raise DataError(f"{path} holds no rows; wanted at least one sample")
    return records


def _repeated(records: RecordStore, ids: "array[int]") -> Iterator[tuple[int, int]]:
    """(record, the first with the same id) of every record whose id came before. Hashes of ids find them, so that a
    million ids are not held as text; the ids themselves decide."""
    import numpy as np  # here, so that importing this is light

    hashes, counts = np.unique(np.frombuffer(ids, np.int64), return_counts=True)
    twice = set(hashes[counts > 1].tolist())
    firsts: dict[str, int] = {}
    for number, own in enumerate(ids if twice else ()):
        if own in twice:
            first = firsts.setdefault(records[number]["id"], number)
            if first != number:
                yield number, first


def check_images(records: Sequence[Record], *, decode: bool = False) -> list[str]:
    """One line for every image that is missing or empty or, with `decode`, cannot be decoded.

    Each path is told once, however many records name it.
    """
    problems, done = [], set()
    for record in first_of_image_sets(records):
        for image in record["images"]:
            if isinstance(image, str) and image in done:
                continue
            if problem := _problem(image, decode):
                problems.append(f"{record['where']} (id {record['id']!r}): {problem}")
            if isinstance(image, str) and (
                problem or decode
            ):  # looking at a good one again costs less than memory
                done.add(image)
    return problems


def require_images(records: Sequence[Record], what: str) -> None:
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
    elif isinstance(image, str) and not _is_full_file(image):
        return (
            f"image {image!r} is missing, empty or no file; correct its name or image_root, or drop the row"
        )
    return None


def _is_full_file(path: str) -> bool:
    try:
        state = os.stat(path)
    except (OSError, ValueError):
        return False
    return stat.S_ISREG(state.st_mode) and state.st_size > 0

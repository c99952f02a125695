"""Data sets -> records: every accepted file and layout, validated, and whether the images are there.

A file is read row by row (`formats/`), then each row becomes a `Record` (`records.py`). All problems of a file are
collected and raised as one `DataError`, so that one run shows them all.
"""

import os
from pathlib import Path

from mmpeft.data.formats import DataError, find_files, read_rows
from mmpeft.data.images import ImageError, load_image
from mmpeft.data.records import ImageRoot, Record, make_record

MAX_LISTED = 20
"""Most problems written out in one error; the rest is counted."""


def load_records(
    path: str | Path,
    *,
    image_root: str | Path | None = None,
    task: str | None = None,
    require_answers: bool = True,
) -> list[Record]:
    """All records of a data file or folder of any format.

    Args:
        path: A file or folder as docs/data.md lists them, with ":split" behind it where it holds several.
        image_root: Folder that image names are relative to and must stay in; default: the file's folder.
        task: Task of the rows that have no `task` themselves.
        require_answers: False for prediction: the last turn of a row may lack its answer.

    Raises:
        DataError: If a row is not a valid sample, two rows share an id, or there is no row. Whether the image
            files exist is not looked at: see `check_images`.
    """
    files = find_files(path, require_answers)
    root = Path(image_root) if image_root is not None else files[0].root
    if not root.is_dir():
        raise DataError(f"image_root {str(root)!r} is not a folder; pass the one image names are relative to")
    images = ImageRoot(root)
    records, problems, seen = [], [], {}
    for file in files:
        for place, row in read_rows(file):
            where = f"{file.name}:{place}"
            try:
                record = make_record(row, f"{file.stem}-{place}", where, images, task, require_answers)
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

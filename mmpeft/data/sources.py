"""Data sets -> records: every accepted file and layout, validated, and whether the images are there.

A file is read row by row (`readers.py`), then each row becomes a `Record` (`records.py`). All problems of a file are
collected and raised as one `DataError`, so that one run shows them all.
"""

import os
from pathlib import Path

from mmpeft.data.images import ImageConfig, ImageError, ImageWorker, image_file
from mmpeft.data.readers import DataError, find_files, read_rows
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
    files = find_files(Path(path))
    root = Path(image_root) if image_root is not None else files[0].parent
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


def check_images(
    records: list[Record], *, decode: bool = False, config: ImageConfig | None = None
) -> list[str]:
    """One line for every image that is missing or empty or, with `decode`, cannot be decoded in time.

    Each path is looked at once, however many records name it.

    Args:
        config: how they are decoded; by default as encoders do whose settings say nothing of it.
    """
    with ImageWorker() as worker:
        return _problems(records, worker if decode else None, config or ImageConfig())


def _problems(records: list[Record], worker: ImageWorker | None, config: ImageConfig) -> list[str]:
    problems, seen = [], set()
    for record in records:
        for image in record["images"]:
            if isinstance(image, str) and image in seen:
                continue
            if problem := _problem(image, worker, config):
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


def _problem(image: str | bytes, worker: ImageWorker | None, config: ImageConfig) -> str | None:
    if worker is not None:
        try:
            worker.load(image, config)
        except ImageError as error:
            return str(error)
    elif isinstance(image, str) and not (os.path.isfile(file := image_file(image)) and os.path.getsize(file)):
        return (
            f"image {image!r} is missing, empty or no file; correct its name or image_root, or drop the row"
        )
    return None

"""Data sets -> records: every accepted file and layout, validated, and whether the images are there.

A file is read row by row (`formats/`), a row is understood by its keys (`layouts/`) and becomes a `Record`
(`records.py`) in a store (`store.py`). All problems of a data set are collected and raised as one `DataError`, so that
one run shows them all.
"""

import os
import stat
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mmpeft.data.formats import DataError, DataFile, find_files, read_rows
from mmpeft.data.images import ImageConfig, ImageError, ImageWorker, image_file
from mmpeft.data.kept_stores import read_or_open
from mmpeft.data.layouts.columns import Columns
from mmpeft.data.layouts.notes import Notes
from mmpeft.data.problems import MAX_LISTED, Problems
from mmpeft.data.records import ImageRoot, Record, RecordReader, place_of
from mmpeft.data.sequences import pick
from mmpeft.data.store import RecordStore, StoreWriter, first_of_image_sets

OnBadSample = Literal["raise", "skip"]
NOT_VALID, MISSING, UNDECODABLE = "not valid", "without an image's file", "of images that cannot be decoded"
"""Why rows are skipped."""
Read = tuple[str, Any, list[Record] | DataError]
"""File and line, the row as it stands there, and its records or what is wrong with it."""


def load_records(
    path: str | Path,
    columns: Columns | None = None,
    *,
    image_root: str | Path | None = None,
    task: str | None = None,
    require_answers: bool = True,
    on_bad_sample: OnBadSample = "raise",
    each_caption: bool = False,
    labelled: bool = False,
    notes: Notes | None = None,
) -> Sequence[Record]:
    """All records of a data file or folder of any format, read as `Reading` says.

    They lie in a `RecordStore`, of which each is made when it is asked for; of large files it is kept for the next
    start.

    Args:
        notes: Is told what was left out; who gives one checks `Columns.check_used`, as several data sets may share a
            mapping.

    Raises:
        DataError: If a row is not a valid sample, two rows share an id, or there is no row. Whether the image
            files exist is not looked at: see `check_images`.
    """
    own = columns or Columns()
    reading = Reading(
        str(path), own, image_root, task, require_answers, on_bad_sample, each_caption, labelled
    )
    parts = [part for file in reading.files for part in file.parts]
    store = read_or_open(parts, reading.root, reading.settings, reading.read)
    noted = Notes.read(store.notes["left aside"])
    if notes is None:
        own.check_used(noted, str(path))
    else:
        notes.add(noted)
    left_out = set(store.notes["repeated"])
    return pick(store, [n for n in range(len(store)) if n not in left_out]) if left_out else store


@dataclass(frozen=True)
class Reading:
    """How a data file or folder is read, and its files.

    Raises:
        DataError: there is no such file, or no such folder of images.
    """

    path: str
    """A file or folder as docs/data.md lists them, with ":split" behind it where it holds several."""
    columns: Columns
    """The user's own mapping."""
    image_root: str | Path | None = None
    """Folder that image names are relative to and must stay in; default: the file's folder."""
    task: str | None = None
    """Task of the rows that have no `task` themselves."""
    require_answers: bool = True
    """False for prediction: the last turn of a row may lack its answer."""
    on_bad_sample: OnBadSample = "raise"
    """Whether a row that is not valid is an error, or is left out and counted."""
    each_caption: bool = False
    """True for training: every caption of a row that lists several is learnt; else they are one answer's references."""
    labelled: bool = False
    """Whether KTO's labels of answers are kept, and wrong answers with them."""
    files: list[DataFile] = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "files", find_files(self.path, self.require_answers))
        if self.image_root is not None and not Path(self.image_root).is_dir():
            raise DataError(
                f"image_root {str(self.image_root)!r} is not a folder; pass the one image names are relative to"
            )

    @property
    def root(self) -> Path:
        """The folder of the images."""
        return self.files[0].root if self.image_root is None else Path(self.image_root)

    @property
    def settings(self) -> dict[str, object]:
        """All that the records depend on beside the bytes of the files."""
        mapping = [[key, column] for key, column in sorted(self.columns.mapping.items())]
        return {
            "path": self.path,  # which may name a split
            "columns": mapping,
            "ignored": sorted(self.columns.ignored),
            "task": self.task,
            "require_answers": self.require_answers,
            "on_bad_sample": self.on_bad_sample,
            "each_caption": self.each_caption,
            "labelled": self.labelled,
        }

    def read(self, writer: StoreWriter, images: ImageRoot) -> RecordStore:
        """Every row as records; a problem of one leaves the others to be looked at.

        Raises:
            DataError: a row has a problem and is not skipped, or none is left.
        """
        problems, notes, ids, places = Problems(), Notes(), array("q"), array("q")
        for number, (_, _, records) in enumerate(self.rows(images, notes), 1):
            if isinstance(records, DataError):
                problems.add(number, str(records))
                continue
            for record in records:
                writer.add(record)
                ids.append(hash(record["id"]))
                places.append(number)
        store = writer.records()
        repeated = []
        for number, first in _repeated(store, ids):
            problems.add(places[number], repeated_id(store[number], store[first]["where"]))
            repeated.append(number)
        if self.on_bad_sample == "skip" and len(store) and problems.count:
            notes.skip(NOT_VALID, problems.first, problems.count)
        else:
            missing = self.columns.missing(notes.mapped)
            problems.refuse(self.path, f" (no row has {missing}, which data.columns maps)" if missing else "")
        if not store:
            raise DataError(f"{self.path} holds no rows; wanted at least one sample")
        writer.notes.update({"left aside": notes.told, "repeated": repeated})
        return store

    def rows(self, images: ImageRoot, notes: Notes) -> Iterator[Read]:
        """Every row."""
        reader = RecordReader(
            *(images, self.task, self.require_answers, self.columns, notes),
            *(self.each_caption, self.labelled),
        )
        for file in self.files:
            file_name, stem = file.name, file.stem
            notes.of_files.update(dict.fromkeys(file.told))
            for place, row in read_rows(file):
                where = f"{file_name}:{place}"
                try:
                    yield where, row, reader.read(row, f"{stem}-{place}", where)
                except DataError as error:
                    name = (
                        f" (id {row['id']!r})" if isinstance(row, dict) and row.get("id") is not None else ""
                    )
                    yield where, row, _placed(error, f"{where}{name}")


def _placed(error: DataError, where: str) -> DataError:
    """The same error, of its kind, with the place of its row."""
    error.args = (f"{where}: {error}",)
    return error


def repeated_id(record: Record, first: str) -> str:
    """What is said of a record whose id that at ``first`` has already."""
    return f"{place_of(record)}: the id is also used at {first}; make ids unique, or drop them all"


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


def check_images(
    records: Sequence[Record], *, decode: bool = False, config: ImageConfig | None = None
) -> list[str]:
    """One line for every image that is missing or empty or, with `decode`, cannot be decoded in time.

    Each path is told once, however many records name it.

    Args:
        config: how they are decoded; by default as encoders do whose settings say nothing of it.
    """
    with ImageWorker() as worker:
        return _problems(records, worker if decode else None, config or ImageConfig())


def _problems(records: Sequence[Record], worker: ImageWorker | None, config: ImageConfig) -> list[str]:
    problems, done = [], set()
    for record in first_of_image_sets(records):
        for image in record["images"]:
            if isinstance(image, str) and image in done:
                continue
            if problem := _problem(image, worker, config):
                problems.append(f"{place_of(record)}: {problem}")
            if isinstance(image, str) and (
                problem or worker
            ):  # to look at a good one again costs less than memory
                done.add(image)
    return problems


def require_images(records: Sequence[Record], what: str) -> None:
    """Raises:
    DataError: an image is missing or empty; ``what`` names the records, and the first problems are listed.
    """
    if problems := check_images(records):
        raise DataError(f"{what}: {len(problems)} images cannot be used\n" + "\n".join(problems[:MAX_LISTED]))


def _problem(image: str | bytes, worker: ImageWorker | None, config: ImageConfig) -> str | None:
    if worker is None:
        return missing_image(image)
    try:
        worker.load(image, config)
    except ImageError as error:
        return str(error)
    return None


def missing_image(image: str | bytes) -> str | None:
    """What is wrong with an image whose file cannot be there; its content is not looked at."""
    if isinstance(image, bytes) or _is_full_file(image):
        return None
    return f"image {image!r} is missing, empty or no file; correct its name or image_root, or drop the row"


def with_images(
    records: Sequence[Record],
    notes: Notes,
    reason: str = MISSING,
    fault: Callable[[str | bytes], str | None] = missing_image,
) -> Sequence[Record]:
    """The records whose images can be used; ``notes`` are told of the others.

    Args:
        reason: why the others are left out.
        fault: what is wrong with an image, if anything.

    Raises:
        DataError: none is left.
    """
    good = []
    for number, record in enumerate(records):
        if problem := next(filter(None, map(fault, record["images"])), None):
            notes.skip(reason, f"{place_of(record)}: {problem}")
        else:
            good.append(number)
    if not good:
        raise DataError(f"all {len(records):,} rows are bad; {notes.first_skipped[reason]}")
    return records if len(good) == len(records) else pick(records, good)


def _is_full_file(path: str) -> bool:
    try:
        state = os.stat(image_file(path))
    except (OSError, ValueError):
        return False
    return stat.S_ISREG(state.st_mode) and state.st_size > 0

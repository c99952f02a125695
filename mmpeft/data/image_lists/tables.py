"""Images and videos that the rows of tables name or hold: CSV, JSON, JSONL, parquet, as training reads them."""

import os
from collections.abc import Sequence
from typing import Any

from mmpeft.data.formats import DataError, DataFile, find_files, read_rows
from mmpeft.data.hash_set import HashSet
from mmpeft.data.image_lists.base import Listed, Part, version_of
from mmpeft.data.images import ImageError
from mmpeft.data.kept_stores import read_or_open
from mmpeft.data.layouts.fields import Fields
from mmpeft.data.layouts.image_root import ImageRoot
from mmpeft.data.layouts.pictures import take_images
from mmpeft.data.layouts.videos import take_video_files
from mmpeft.data.records import Record
from mmpeft.data.store import RecordStore, StoreWriter
from mmpeft.errors import RefusedError


class Table(Part):
    """The images and videos that the rows of a table name or hold, each once.

    Args:
        path: as `data.train` takes it.
        prefix: stands before their names.
        videos: whether those are wanted.
    """

    def __init__(self, path: str, prefix: str, videos: bool):
        self._path, files = path, find_files(path, require_answers=False)
        parts = [part for file in files for part in file.parts]
        self._store = read_or_open(
            parts,
            files[0].root,
            {"path": path, "of": "images", "videos": videos},
            lambda *to: _read_table(files, videos, *to),
        )
        noted = self._store.notes
        self.names = [os.path.join(prefix, name) for name in noted["names"]]
        self._ids, self._errors, self.repeated = noted["ids"], noted["errors"], noted["repeated"]
        self._videos = frozenset(noted["videos"])
        self.num_videos = len(self._videos)
        if len(self._errors) == len(self.names):
            raise RefusedError(
                f"no row of {path} has an image that can be used; {next(iter(self._errors.values()), '')}"
            )

    @property
    def ids(self) -> Sequence[str | None]:
        return self._ids

    def item(self, number: int) -> Listed:
        def read() -> str | bytes:
            if error := self._errors.get(str(number)):
                raise ImageError(error)
            return self._store.item(number)["images"][0]

        def version() -> Any:
            if str(number) in self._errors:
                return None
            image = read()
            return version_of(image) if isinstance(image, str) else [self._store.content, number]

        return Listed(self.names[number], read, version, self._ids[number], number in self._videos)


def _read_table(
    files: Sequence[DataFile], with_videos: bool, writer: StoreWriter, root: ImageRoot
) -> RecordStore:
    """The rows of a table: of each its image or video alone."""
    names: list[str] = []
    ids: list[str | None] = []
    errors: dict[str, str] = {}
    videos: list[int] = []
    seen, repeated = HashSet(), 0
    for file in files:
        for place, row in read_rows(file):
            where = f"{file.name}:{place}"
            if isinstance(row, DataError):
                raise DataError(f"{where}: {row}")
            image, own, is_video = None, None, False
            try:
                fields = _fields_of(row)
                own = fields.take("id")
                image, is_video = _shown_by(fields, root, with_videos)
            except DataError as error:
                errors[str(len(names))] = f"{where}: {error}"
            if image is not None and not seen.add(hash(image)):
                repeated += 1
                continue
            videos += [len(names)] * is_video
            names.append(os.path.relpath(image, root.folder) if isinstance(image, str) else where)
            ids.append(None if own is None else str(own))
            writer.add(
                Record(id="", images=[] if image is None else [image], turns=[], task=None, where=where)
            )
    writer.notes.update(
        {"names": names, "ids": ids, "errors": errors, "repeated": repeated, "videos": videos}
    )
    return writer.records()


def _fields_of(row: Any) -> Fields:
    if not isinstance(row, dict):
        raise DataError(f"found a {type(row).__name__}; wanted an object that names an image")
    return Fields(row)


def _shown_by(fields: Fields, root: ImageRoot, with_videos: bool) -> tuple[str | bytes, bool]:
    """The only image or video of a row, and whether it is a video."""
    videos = take_video_files(fields, root) if with_videos and fields.has("video") else []
    images, _ = take_images(fields, root)
    if len(images) + len(videos) != 1:
        told = f" and {len(videos)} videos" if videos else ""
        raise DataError(
            f"found {len(images) or 'no'} images{told} among the keys {sorted(fields.row)[:20]}; wanted one, under a "
            "key such as image or video"
        )
    return [*images, *videos][0], bool(videos)

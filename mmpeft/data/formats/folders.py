"""Folders of images -> rows: imagefolders with metadata, images with side-car texts."""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from mmpeft.data.formats.base import DataError, Rows

NO_CAPTIONS = {
    "boxes, as YOLO writes them": re.compile(r"\d+(\s+[\d.eE+-]+){4,}\s*"),
    "questions and their answers, as MME writes them": re.compile(r"[^\t]+\t[^\t]+"),
}
"""What each line of a text beside an image may be instead: the number of a class and the places of its box or outline;
columns with a tab between them."""
TEXT_ENDINGS = (".txt", ".caption")
NO_DATA = (
    *("thumbs.db", "desktop.ini", "readme.md", "readme.txt", "license", "license.txt"),
    *("dataset_infos.json", "classes.txt"),
)
FILE_NAMES = {"file_names": "images", "image_file_name": "image", "image_file_names": "images"}
"""Spellings of `datasets` beside `file_name` -> the key that says the same."""


def metadata_rows(rows: Rows) -> Rows:
    """The rows of an imagefolder's metadata, whose images may stand under any `*_file_name` or `*_file_names`."""
    for place, row in rows:
        yield place, _with_images(row) if isinstance(row, dict) else row


def _with_images(row: dict[str, Any]) -> Any:
    given = {key: value for key, value in row.items() if value is not None}
    named = [key for key in given if key.endswith(("_file_name", "_file_names")) and key not in FILE_NAMES]
    if len(named) > 1:
        return DataError(f"found {named}, and in which order is not told; write one list, file_names")
    names = FILE_NAMES | {name: "images" if name.endswith("s") else "image" for name in named}
    images = [key for key in given if key in names or key == "file_name"]
    if len(images) > 1:
        return DataError(f"images are given more than once, under {images}; keep one of them")
    return {names.get(key, key): value for key, value in row.items()}


def captioned_rows(folder: Path) -> Rows:
    """Images beside each of which a text of its name holds the caption."""
    by_stem: dict[str, list[Path]] = defaultdict(list)
    for file in data_files(folder):
        by_stem[file.stem].append(file)
    for files in by_stem.values():
        texts = [file for file in files if file.suffix.lower() in TEXT_ENDINGS]
        images = [file for file in files if file not in texts]
        names = [file.name for file in files]
        if len(texts) != 1 or len(images) != 1:
            yield (
                names[0],
                DataError(f"found {names}; wanted one image and one text of its name: add or drop one"),
            )
            continue
        try:
            text = texts[0].read_text("utf-8-sig").strip()
            if kind := _no_caption(text):
                yield texts[0].name, DataError(f"holds {kind}, and no caption; wanted a text")
            else:
                yield images[0].name, {"image": images[0].name, "text": text}
        except UnicodeDecodeError as error:
            yield texts[0].name, DataError(f"not UTF-8 at byte {error.start}; save the file as UTF-8")


def _no_caption(text: str) -> str | None:
    """What a text beside an image is, if that is no caption."""
    for kind, line in NO_CAPTIONS.items():
        if text and all(map(line.fullmatch, text.splitlines())):
            return kind
    return None


def data_files(folder: Path) -> list[Path]:
    """What lies in a folder but hidden files and those that systems and authors leave there, by name."""
    return sorted(filter(is_data, folder.iterdir()))


def is_data(file: Path) -> bool:
    """Whether a file is no hidden one, and none that systems and authors leave beside data."""
    return not file.name.startswith(".") and file.name.lower() not in NO_DATA

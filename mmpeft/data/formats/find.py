"""What a path of `data.train` stands for: files by their endings, folders by what lies in them, sets of the hub.

`path:split` is one split of it, `questions.json+annotations.json` are two files that belong together.
"""

import difflib
import json
import os
from collections.abc import Callable
from pathlib import Path

from mmpeft.data.formats.base import DataError, DataFile, Rows
from mmpeft.data.formats.class_folders import ClassFolders
from mmpeft.data.formats.columns import arrow_rows, parquet_rows
from mmpeft.data.formats.folders import TEXT_ENDINGS, captioned_rows, data_files, metadata_rows
from mmpeft.data.formats.hub import hub_set, is_hub_id
from mmpeft.data.formats.json_rows import json_rows, pair_rows
from mmpeft.data.formats.splits import choose_split, of_split, require_all_shards, split_in_name
from mmpeft.data.formats.streams import ending
from mmpeft.data.formats.tables import table_rows
from mmpeft.data.formats.tars import tar_rows
from mmpeft.data.image_names import is_image_name

READERS: dict[str, Callable[[Path], Rows]] = {
    **dict.fromkeys((".csv", ".tsv", ".txt", ".token"), table_rows),
    ".parquet": parquet_rows,
    ".arrow": lambda path: arrow_rows([path]),
    ".tar": tar_rows,
}
"""Ending -> reader. JSON has its own, which knows of splits and of files that belong together."""
JSON = (".json", ".jsonl", ".ndjson")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SHARDS = (".parquet", ".tar")


def find_files(path: Path | str, require_answers: bool = True) -> list[DataFile]:
    """The data files behind a path, in the order in which they are read.

    Args:
        require_answers: False for prediction: questions of VQA v2 need no annotations beside them.

    Raises:
        DataError: There is no such file or folder, nothing in it that can be read, or several splits of which
            none is named.
    """
    name, wanted = str(path), None
    if not os.path.lexists(name):
        left, colon, right = name.rpartition(":")
        if colon and right and "/" not in right and all(os.path.exists(part) for part in _pair(left)):
            name, wanted = left, right
    pair = [Path(part) for part in _pair(name)]
    if len(pair) > 1:
        return [_belonging_together(pair, require_answers, wanted)]
    (only,) = pair
    if only.is_dir():
        return _in_folder(only, wanted)
    if only.is_file():
        return [_file(only, wanted, require_answers)]
    if is_hub_id(name):
        return [hub_set(name)]
    beside = os.listdir(only.parent) if only.parent.is_dir() else []
    close = difflib.get_close_matches(only.name, beside, n=3)
    seen_from = "" if only.is_absolute() else f", seen from {Path.cwd()}"
    raise DataError(
        f"{name!r} is neither a file nor a folder{seen_from}; closest names in {str(only.parent)!r}: {close}; a data "
        "set of the hub is written user/name:split"
    )


def _pair(name: str) -> list[str]:
    """The files that a "+" joins, where all of them are there; the later ones may lie beside the first."""
    first, *others = name.split("+")
    beside = [part if os.path.isfile(part) else os.path.join(os.path.dirname(first), part) for part in others]
    parts = [first, *beside]
    return parts if not os.path.lexists(name) and all(os.path.isfile(part) for part in parts) else [name]


def _belonging_together(pair: list[Path], require_answers: bool, wanted: str | None) -> DataFile:
    if wrong := [path for path in pair if ending(path) != ".json"]:
        raise DataError(f"{wrong[0]} ends in {ending(wrong[0])!r}; only .json documents are joined by +")
    first = pair[0]
    return DataFile(first, lambda: pair_rows(pair, require_answers, wanted), first.parent, tuple(pair))


def _file(path: Path, wanted: str | None = None, require_answers: bool = True) -> DataFile:
    kind = ending(path)
    if path.name == "dataset_info.json":
        raise DataError(f"{path} tells of data files and holds no rows; name the data file, or a folder")
    if kind in JSON:
        return DataFile(path, lambda: json_rows(path, require_answers, wanted), path.parent, (path,))
    if kind not in READERS:
        known = sorted([*JSON, *READERS])
        raise DataError(f"{path} ends in {path.suffix!r}; wanted one of {known}, also .gz, or a folder")
    if kind != path.suffix.lower() and kind in SHARDS:
        raise DataError(f"{path} is packed; unpack it: gunzip {path.name}")
    return DataFile(path, lambda: of_split(READERS[kind](path), wanted, path), path.parent, (path,))


def _in_folder(folder: Path, wanted: str | None) -> list[DataFile]:
    """The one reading of a folder that what lies in it allows."""
    if saved := _saved_to_disk(folder, wanted):
        return [saved]
    if metadata := [folder / name for name in METADATA if (folder / name).is_file()]:
        if len(metadata) > 1:
            names = [file.name for file in metadata]
            raise DataError(f"{folder} holds {names}; wanted one of them: the others would not be read")
        file = _file(metadata[0], wanted)
        return [DataFile(file.path, lambda: metadata_rows(file.read()), file.root, file.parts)]
    if shards := sorted(
        file for file in folder.iterdir() if file.suffix.lower() in SHARDS and file.is_file()
    ):
        return [_file(file) for file in _of_one_split(folder, shards, wanted)]
    found = data_files(folder)
    folders = [file for file in found if file.is_dir()]
    if [file.name for file in folders] == ["data"] and not any(map(_may_be_image, found)):
        return _in_folder(folder / "data", wanted)  # as sets of the hub are downloaded
    if folders and all(split_in_name(file) for file in folders) and not any(map(_may_be_image, found)):
        by_split = {file.name: file for file in folders}
        return _in_folder(by_split[choose_split(folder, by_split, wanted)], None)
    if wanted is not None:
        splits = [file for file in folders if split_in_name(file)]
        others = [file.name for file in found if file not in splits]
        there = (
            f"beside its splits {others[:5]}; name the folder of one, such as {splits[0]}"
            if splits
            else "no splits"
        )
        raise DataError(f"{folder} has {there}, found {wanted!r}; leave out :{wanted}")
    return [_images(folder, found, folders)]


def _saved_to_disk(folder: Path, wanted: str | None) -> DataFile | None:
    """What `datasets` wrote with save_to_disk: one set, or a folder for each split."""
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        split = choose_split(folder, splits, wanted)
        return _saved_to_disk(folder / split, None)
    if not (folder / "state.json").is_file() or not (folder / "dataset_info.json").is_file():
        return None
    if wanted is not None:
        raise DataError(f"{folder} is one split, found {wanted!r}; leave out :{wanted}")
    state = json.loads((folder / "state.json").read_text())
    if state.get("_indices_data_files"):
        raise DataError(
            f"{folder} keeps the order of its rows apart; save it once more with flatten_indices()"
        )
    names = [file["filename"] for file in state["_data_files"]]
    features = json.loads((folder / "dataset_info.json").read_text()).get("features") or {}
    files = [folder / name for name in names]
    if missing := [file.name for file in files if not file.is_file() or file.parent != folder]:
        raise DataError(f"{folder} lacks {missing[0]!r}, which its state.json names; save it again")
    return DataFile(folder, lambda: arrow_rows(files, features), folder, tuple(files))


def _of_one_split(folder: Path, files: list[Path], wanted: str | None) -> list[Path]:
    if len({file.suffix.lower() for file in files}) > 1:
        raise DataError(f"{folder} holds parquet files and tars; wanted one kind: give them as a list")
    splits = {file: split_in_name(file) for file in files}
    named = {split for split in splits.values() if split is not None}
    if not named:
        if wanted is not None:
            raise DataError(
                f"{folder} has no splits in its file names, found {wanted!r}; leave out :{wanted}"
            )
        require_all_shards(files)
        return files
    if without := [file.name for file in files if splits[file] is None]:
        raise DataError(
            f"{folder} holds the splits {sorted(named)} and {without[0]!r} of none; name files as a list"
        )
    split = choose_split(folder, named, wanted)
    chosen = [file for file in files if splits[file] == split]
    require_all_shards(chosen)
    return chosen


def _images(folder: Path, found: list[Path], folders: list[Path]) -> DataFile:
    """A folder of class folders, or of images with their texts."""
    texts = [file for file in found if file.suffix.lower() in TEXT_ENDINGS]
    if classes := ClassFolders(folder):
        if wrong := classes.no_class:
            raise DataError(
                f"{folder} holds {wrong!r} beside {len(found) - 1} other folders of images, which is no name of a "
                "class; give a folder of class folders alone, or write metadata.jsonl"
            )
        return DataFile(folder, classes.rows, folder, tuple(folders), classes.told())
    if texts and not folders and any(map(_may_be_image, found)):
        return DataFile(folder, lambda: captioned_rows(folder), folder, (folder, *texts))
    raise DataError(
        f"{folder} holds {sorted(os.listdir(folder))[:10]}; wanted metadata.jsonl, metadata.csv or "
        "metadata.parquet (one of them), parquet files, tars, folders of splits or of two classes and more, or images "
        "with a .txt each; to read one file of it, name the file"
    )


def _may_be_image(path: Path) -> bool:
    return is_image_name(path.name) and path.is_file()

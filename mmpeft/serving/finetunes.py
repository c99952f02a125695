"""Folders of finetunes: PEFT's, a finetune of a run, or a run, which must be on the base that is being served."""

from collections.abc import Iterator
from pathlib import Path

from mmpeft.adapters.adapter_file import CONFIG_FILE
from mmpeft.errors import MissingFileError, RefusedError
from mmpeft.names import unknown_finetune
from mmpeft.runs.identity import check_identity
from mmpeft.runs.layout import MANIFEST, adapter_folder
from mmpeft.runs.manifest import Manifest, read_manifest


def finetune_folder(folder: str | Path, name: str, served: Manifest) -> Path:
    """The folder of one finetune.

    Args:
        folder: its own, or that of a run, of which it is the one of that name, or the only one.
        served: the run whose base it is to be put on.

    Raises:
        RefusedError: there is none, or it belongs to another base.
    """
    folder = Path(folder)
    if (folder / MANIFEST).is_file():
        names = read_manifest(folder).adapters
        if name not in names and len(names) != 1:
            raise unknown_finetune(name, names)
        folder = adapter_folder(folder, name if name in names else names[0])
    if not (folder / CONFIG_FILE).is_file():
        raise MissingFileError(
            f"{folder}: no {CONFIG_FILE} is there; wanted the folder of an adapter in PEFT's format, or of a run"
        )
    run = folder.absolute().parents[1]
    if (run / MANIFEST).is_file() and adapter_folder(run, folder.name) == folder.absolute():
        check_identity(read_manifest(run), served.identity, run)
    return folder


def named_folders(folders: list[str], served: Manifest) -> Iterator[tuple[str, Path]]:
    """(name, folder) of every finetune of these folders: all of a run, and any other by its own name.

    Raises:
        RefusedError: as `finetune_folder`.
    """
    for folder in map(Path, folders):
        names = read_manifest(folder).adapters if (folder / MANIFEST).is_file() else [folder.absolute().name]
        if not names:
            raise RefusedError(f"{folder} has no finetunes to serve; name another run, or leave it out")
        for name in names:
            yield name, finetune_folder(folder, name, served)

"""Data sets of the hub: `user/name`, `user/name:split`, `user/name@revision:split`, `user/name:config:split`.

It is the only module that imports `datasets`, which fetches a set once into its own cache.
"""

import re
from pathlib import Path
from typing import Any

from mmpeft.data.formats.base import DataError, DataFile
from mmpeft.data.formats.columns import arrow_rows
from mmpeft.data.formats.splits import choose_split
from mmpeft.files import write_whole
from mmpeft.hashing import hash_json
from mmpeft.paths import home

HUB_ID = re.compile(
    r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?(:(?P<config>[\w.-]+)(?=:))?(:(?P<split>[\w.+-]+))?"
)
COMMIT = re.compile(r"[0-9a-f]{40}")
"""As `datasets` calls the folder of what it fetched."""


def is_hub_id(path: str) -> bool:
    """Whether it is written as one and no folder here is meant: there is none of the user's name."""
    match = HUB_ID.fullmatch(path)
    return match is not None and not Path(path.partition("/")[0]).exists()


def hub_set(path: str) -> DataFile:
    """The rows of one split.

    Raises:
        DataError: there is no such set, config or split, or no way to the hub.
    """
    match = HUB_ID.fullmatch(path)
    assert match is not None, "asked by is_hub_id"
    name, revision, config = match["name"], match["revision"], match["config"]
    try:
        from datasets import load_dataset
        from huggingface_hub import HfApi, constants

        offline = constants.HF_HUB_OFFLINE
        if not offline:  # asked once, and at once: datasets tries for half a minute
            HfApi().dataset_info(name, revision=revision, timeout=30)
        splits: Any = load_dataset(name, config, revision=revision)
    except Exception as error:  # of the hub, of the network and of the set's own files, of many types
        reason = " ".join(str(error).split())
        raise DataError(
            f"{path!r} is neither a file nor a folder here, and the hub gave no data set of that name "
            f"({type(error).__name__}: {reason:.200}); correct the name, or download it and give its folder; a set "
            "that was loaded before is read without a network where HF_HUB_OFFLINE=1"
        ) from error
    split = choose_split(path.removesuffix(f":{match['split']}"), splits, match["split"])
    loaded = splits[split]
    files = tuple(Path(file["filename"]) for file in loaded.cache_files)
    features = dict(loaded.features.to_dict())
    _check_commit(name, revision, files, offline)
    return DataFile(
        path=Path(f"{name.replace('/', '-')}-{split}"),
        read=lambda: arrow_rows(list(files), features),
        root=Path(
            constants.HF_HOME
        ),  # of an imagefolder its images lie in the cache, and are named by paths there
        parts=files,
    )


def _check_commit(name: str, revision: str | None, files: tuple[Path, ...], offline: bool) -> None:
    """Without a network `datasets` takes what it fetched last, whichever revision that was: it is compared with the
    commit that the revision was when it was fetched.

    Raises:
        DataError: it is another one, or it cannot be told.
    """
    noted = home() / "hub" / hash_json([name, revision])
    folder = files[0].parent if files else Path()
    if not offline:
        if COMMIT.fullmatch(folder.name):
            write_whole(noted, folder.name)
        return
    others = [own.name for own in folder.parent.glob("*") if COMMIT.fullmatch(own.name)]
    told = noted.read_text() if noted.exists() else revision if COMMIT.fullmatch(revision or "") else None
    certain = told == folder.name or (told is None and revision is None and {*others} <= {folder.name})
    if not certain:
        was = f"was {told[:12]}" if told else "was never fetched here"
        raise DataError(
            f"without a network (HF_HUB_OFFLINE) datasets gives commit {folder.name[:12]} of {name}, fetched last, "
            f"and {revision or 'its newest revision'} {was}; fetch it once more with a network, or delete the other in "
            f"{folder.parent}"
        )

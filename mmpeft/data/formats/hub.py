"""Data sets of the hub: `user/name`, `user/name:split`, `user/name@revision:split`, `user/name:config:split`.

It is the only module that imports `datasets`, which fetches a set once into its own cache.
"""

import re
from pathlib import Path
from typing import Any

from mmpeft.data.formats.base import DataError, DataFile
from mmpeft.data.formats.columns import arrow_rows
from mmpeft.data.formats.splits import choose_split

HUB_ID = re.compile(
    r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?(:(?P<config>[\w.-]+)(?=:))?(:(?P<split>[\w.+-]+))?"
)


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

        if not constants.HF_HUB_OFFLINE:  # asked once, and at once: datasets tries for half a minute
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
    return DataFile(
        path=Path(f"{name.replace('/', '-')}-{split}"),
        read=lambda: arrow_rows(list(files), features),
        root=Path(
            constants.HF_HOME
        ),  # of an imagefolder its images lie in the cache, and are named by paths there
        parts=files,
    )

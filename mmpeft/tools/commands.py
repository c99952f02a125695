"""The commands that look after the feature cache; those of the other tools are in `mmpeft.commands`."""

import sys
from typing import Literal


def cache(
    action: Literal["list", "verify", "clear"], folder: str | None = None, encoder: str | None = None
) -> None:
    """Lists, checks or deletes the features of images that fits have kept on disk.

    A fit writes the features of images that it will see again, once per encoder, and says before how many GB; fits,
    tests, `mmpeft ask`, captions and the demo read them. `data.cache.max_gb` limits them, `data.cache.build=never`
    writes none. What is deleted is encoded again when it is needed.

        mmpeft cache list
        mmpeft cache verify
        mmpeft cache clear --encoder 3f0c

    Args:
        action: list what each encoder's features take; verify reads every byte, deletes shards that are not as they
            were written, and ends with code 1 if there were any; clear deletes.
        folder: the cache's, as in the configs' data.cache; by default that of the mmpeft home.
        encoder: of one encoder alone: its folder's name in the list, or how it begins.
    """
    from mmpeft.tools.cache_folders import clear_cache, list_cache, verify_cache

    if action == "list":
        list_cache(folder, encoder)
    elif action == "clear":
        clear_cache(folder, encoder)
    elif verify_cache(folder, encoder):
        sys.exit(1)

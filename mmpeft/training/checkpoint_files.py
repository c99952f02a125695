"""Checkpoint files: written whole or not at all, checked for damage, and found again by a run that goes on.

::

    checkpoints/last.ckpt        the newest
    checkpoints/previous.ckpt    the one before it, should the newest be damaged
"""

import os
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.utils._pytree import tree_leaves

from mmpeft.errors import RefusedError
from mmpeft.files import whole_file
from mmpeft.runs.layout import CHECKPOINTS, LAST

PREVIOUS = "previous.ckpt"
OF_A_RUN, OF_A_FIT = {"mmpeft", "state_dict", "pytorch-lightning_version"}, {"optimizer_states", "loops"}
"""Keys of every checkpoint, and those that going on needs too: Lightning's ``save_weights_only`` leaves some out."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, flushes to disk, then renames: a checkpoint is whole or not there. The
    ``last.ckpt`` that it replaces becomes ``previous.ckpt``.

    Lightning 2.6.6 stages in the system's temporary folder and moves, which is a copy (and can be seen half
    done) when that is another filesystem.
    """

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Raises:
        RefusedError: the file is no checkpoint of a run, or a damaged one.
        """
        if reason := damage(path):
            raise RefusedError(
                f"{path} is no whole checkpoint ({reason}); `mmpeft fit --resume` takes the newest whole one"
            )
        checkpoint = super().load_checkpoint(path, *args, **kwargs)
        if not isinstance(checkpoint, dict) or not checkpoint.keys() >= OF_A_RUN:
            raise RefusedError(
                f"{path} is no checkpoint of a run, or was not written by mmpeft; give --ckpt_path a file from "
                f"{CHECKPOINTS}/"
            )
        return checkpoint

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Raises:
        RefusedError: there is no room. What was there is kept.
        """
        target = Path(path)
        with whole_file(target, num_bytes(checkpoint)) as unfinished:
            with unfinished.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            if target.name == LAST and target.exists():
                os.replace(target, target.with_name(PREVIOUS))


def damage(path: str | Path) -> str | None:
    """What is wrong with a checkpoint file; None for a whole one. Reads all of it: torch itself compares no checksums
    when it loads."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is not None:
            return f"{broken} does not have its checksum"
        torch.load(path, map_location="meta", weights_only=True)
    except FileNotFoundError:
        return "it is not there"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    except Exception as error:  # a pickle that is damaged can raise any
        told = str(error).splitlines() or [type(error).__name__]
        return "it is empty" if Path(path).stat().st_size == 0 else told[0]
    return None


def last_checkpoint(run: str | Path) -> Path:
    """Raises:
    RefusedError: the run has none.
    """
    path = Path(run) / CHECKPOINTS / LAST
    if not path.exists():
        raise RefusedError(
            f"--ckpt_path last: {run} has no {CHECKPOINTS}/{LAST}; leave it out to begin from the start"
        )
    return path


def newest_whole_checkpoint(run: str | Path) -> Path:
    """The newest checkpoint of a run that is not damaged and can be gone on with; each that is passed over is told.

    Raises:
        RefusedError: there is none.
    """
    passed = []
    for path in _newest_first(Path(run, CHECKPOINTS)):
        if reason := damage(path):
            passed.append(f"{path} is damaged ({reason})")
        elif _is_of_weights(path):
            passed.append(f"{path} holds weights alone")
        else:
            return path
        print(f"{passed[-1]}; looking for an older one", file=sys.stderr)
    told = "; ".join(passed) or f"{run} has no checkpoint in {CHECKPOINTS}/"
    raise RefusedError(f"--resume: {told}; begin from the start without --resume")


def _is_of_weights(path: Path) -> bool:
    checkpoint = torch.load(path, map_location="meta", weights_only=True)
    of_a_run = isinstance(checkpoint, dict) and checkpoint.keys() >= OF_A_RUN
    return of_a_run and not checkpoint.keys() >= OF_A_FIT


def _newest_first(folder: Path) -> list[Path]:
    """The checkpoints of a folder. In a copied run times are those of copying, or whole seconds, and what `LAST` has
    replaced may look the newer one."""
    written = {path: path.stat().st_mtime_ns for path in folder.glob("*.ckpt")}
    last, previous = folder / LAST, folder / PREVIOUS
    if last in written and previous in written:
        written[previous] = min(written[previous], written[last])
    return sorted(written, key=lambda path: (-written[path], path == previous))


def num_bytes(checkpoint: Any) -> int:
    """Of the tensors in nested containers."""
    tensors = [leaf for leaf in tree_leaves(checkpoint) if isinstance(leaf, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

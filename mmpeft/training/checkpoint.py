"""What a Lightning checkpoint of ours holds besides Lightning's own state, and how it reaches the disk."""

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO


def stamp(identity: dict[str, Any], shapes: dict[str, list[int]]) -> dict[str, Any]:
    """What the checkpoint belongs to, and the state of torch's random number generators."""
    rng = {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}
    return {"identity": identity, "shapes": shapes, "rng": rng}


def verify(checkpoint: dict[str, Any], identity: dict[str, Any], shapes: dict[str, list[int]]) -> None:
    """Raises:
    ValueError: the checkpoint is of another base or trains other tensors; field by field.
    """
    saved = checkpoint.get("mmpeft")
    if saved is None:
        raise ValueError(
            "this checkpoint was not written by mmpeft; give --ckpt_path a file from checkpoints/"
        )
    lines = [
        f"  {part}: the checkpoint has {saved['identity'].get(part)}, this run {identity[part]}"
        for part in identity
        if saved["identity"].get(part) != identity[part]
    ]
    for name in sorted(saved["shapes"].keys() | shapes.keys()):
        if saved["shapes"].get(name) != shapes.get(name):
            lines.append(
                f"  {name}: the checkpoint has {saved['shapes'].get(name)}, this run {shapes.get(name)}"
            )
    if lines:
        shown = "\n".join(lines[:12]) + (f"\n  and {len(lines) - 12} more" if len(lines) > 12 else "")
        raise ValueError(f"the checkpoint does not fit this run:\n{shown}")


def restore_rng(rng: dict[str, Any]) -> None:
    """Puts the generators back where the checkpoint left them."""
    torch.set_rng_state(rng["torch"])
    torch.cuda.set_rng_state_all(rng["cuda"])


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, flushes to disk, then renames: a checkpoint is whole or not there.

    Lightning 2.6.6 stages in the system's temporary folder and moves, which is a copy (and can be seen half
    done) when that is another filesystem.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, staged = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(staged, target)
        except BaseException:
            Path(staged).unlink(missing_ok=True)
            raise

"""Resume: what checkpoints hold besides Lightning's own state, and which run they fit."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from mmpeft.data.template import current_settings
from mmpeft.errors import RefusedError
from mmpeft.hashing import differences

ORDER_SETTINGS = ("seed", "shots", "shots_seed", "weights", "limit", "task", "image_root")
"""Of the data: what decides which example comes when, and how it reads."""


def stamp(belongs_to: dict[str, Any]) -> dict[str, Any]:
    """What the checkpoint belongs to, and the state of torch's random number generators."""
    rng = {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}
    return {"belongs_to": belongs_to, "rng": rng}


def belongs_to(
    base: dict[str, Any],
    run: dict[str, Any],
    finetunes: Mapping[str, Any],
    data: Any,
    template: dict[str, Any],
    tensors: dict[str, list[int]],
) -> dict[str, Any]:
    """What a checkpoint must agree with to be resumed, in plain types: torch would refuse to load classes of ours. The
    settings are those whose old value resuming would bring back, whatever the command line says.

    Args:
        base: identity of the frozen parts.
        run: settings of the whole run.
        finetunes: name -> `Finetune`.
        data: the `VisionLanguageData`.
        template: `Template.settings`.
        tensors: name -> shape of what trains.
    """
    order = {name: getattr(data, name) for name in ORDER_SETTINGS}
    order |= {"packing": asdict(data.packing), "train": data.paths["train"], "template": template}
    own = {
        name: {
            **asdict(finetune.settings),
            "adapter": [
                {"method": p.method, **vars(p)}
                for p in (finetune.adapter.parts() if finetune.adapter else [])
            ],
            "data": dict(finetune.paths),
            "max_steps": finetune.max_steps,
            "shots_seed": finetune.shots_seed,
        }
        for name, finetune in finetunes.items()
    }
    return {"base": base, "model": run, "finetunes": own, "data": order, "tensors": tensors}


def verify(checkpoint: dict[str, Any], belongs_to: dict[str, Any]) -> None:
    """Raises:
    RefusedError: the checkpoint is of another base, trains other tensors, or was made with other settings that
        resuming would silently keep; field by field.
    """
    saved = checkpoint.get("mmpeft")
    if saved is None:
        raise RefusedError(
            "this checkpoint was not written by mmpeft; give --ckpt_path a file from checkpoints/"
        )
    if "finetunes" not in saved["belongs_to"]:
        raise RefusedError(
            "this checkpoint is of an older mmpeft, which laid them out otherwise: end its run with that version, or "
            "begin a new run from its results with --model.start_from"
        )
    order = saved["belongs_to"]["data"]
    if "style" in order:
        style = {"style": order.pop("style"), "max_length": order["packing"]["max_length"]}
        order["template"] = current_settings(style)
    lines = differences(saved["belongs_to"], belongs_to, label="the checkpoint has")
    if lines:
        shown = "\n".join(lines[:12]) + (f"\n  and {len(lines) - 12} more" if len(lines) > 12 else "")
        raise RefusedError(
            f"the checkpoint does not fit this run:\n{shown}\nResume with the run's own settings, or begin a new "
            "run from its results with --model.start_from"
        )


def restore_rng(rng: dict[str, Any]) -> None:
    """Puts the generators back where the checkpoint left them."""
    torch.set_rng_state(rng["torch"])
    if len(rng["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(rng["cuda"])

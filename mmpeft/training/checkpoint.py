"""Resume: what checkpoints hold besides Lightning's own state, and which run they fit."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch

from mmpeft.data.records import Record, said_beside
from mmpeft.data.template import current_settings
from mmpeft.errors import RefusedError
from mmpeft.hashing import differences, hash_json, hash_rows
from mmpeft.models.language import LanguageConfig
from mmpeft.training.checkpoint_files import OF_A_FIT
from mmpeft.training.preferences import PreferenceConfig

LATER = {"lora_b_ratio": 1.0, "objective": "likelihood", "preferences": asdict(PreferenceConfig())}
"""Settings of a finetune that checkpoints of earlier versions do not have -> what these were as if set to."""
ORDER_SETTINGS = ("seed", "shots", "shots_seed", "weights", "limit", "task", "image_root")
"""Of the data: what decides which example comes when, and how it reads."""
STEP_SETTINGS = (
    *("accumulate_grad_batches", "gradient_clip_val", "precision", "limit_train_batches", "overfit_batches"),
)
"""Of the trainer: what decides what a step is, and how many make an epoch."""


def stamp(belongs_to: dict[str, Any]) -> dict[str, Any]:
    """What the checkpoint belongs to, and the state of torch's random number generators, in each process of its own
    device: those of the others would take memory there."""
    cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
    rng = {"torch": torch.get_rng_state(), "cuda": cuda}
    return {"belongs_to": belongs_to, "rng": rng}


def hash_records(records: Iterable[Record], key: Callable[[Any], str]) -> str:
    """Identity of what is learnt from, by its content and that of its images.

    Args:
        records: of one finetune.
        key: of an image.
    """
    told = ("turns", "choices", "task")
    return hash_rows(
        [[*(r.get(name) for name in told), *said_beside(r)], [key(image) for image in r["images"]]]
        for r in records
    )


def hash_learnt_from(finetunes: Mapping[str, Any], key: Callable[[Any], str]) -> dict[str, str]:
    """Finetune -> `hash_records` of its training data."""
    return {name: hash_records(own.records.get("train", []), key) for name, own in finetunes.items()}


def belongs_to(
    started: Any,
    language: LanguageConfig,
    trainer: Any,
    run: dict[str, Any],
    finetunes: Mapping[str, Any],
    data: Any,
    template: dict[str, Any],
    records: dict[str, str],
    tensors: dict[str, list[int]],
) -> dict[str, Any]:
    """What a checkpoint must agree with to be resumed, in plain types: torch would refuse to load classes of ours. The
    settings are those whose old value resuming would bring back, whatever the command line says, and those that the
    config of the run would claim for steps that were taken without them.

    Args:
        started: the `Started` of the run.
        language: how the language model is held.
        trainer: Lightning's.
        run: settings of the whole run.
        finetunes: name -> `Finetune`.
        data: the `VisionLanguageData`.
        template: `Template.settings`.
        records: finetune -> `hash_records` of its training data.
        tensors: name -> shape of what trains.
    """
    held = {name: getattr(language, name) for name in ("dtype", "quantization", "attention")}
    steps = {name: getattr(trainer, name) for name in STEP_SETTINGS}
    order = {name: getattr(data, name) for name in ORDER_SETTINGS}
    order |= {"packing": asdict(data.packing), "train": data.paths["train"], "template": template}
    own = {
        name: {
            **_settings(finetune.settings),
            "adapter": [
                {"method": p.method, **vars(p)}
                for p in (finetune.adapter.parts() if finetune.adapter else [])
            ],
            "data": dict(finetune.paths),
            "max_steps": finetune.max_steps,
            "shots_seed": finetune.shots_seed,
            **({} if finetune.seed is None else {"seed": finetune.seed}),
        }
        for name, finetune in finetunes.items()
    }
    start = started.manifest
    weights = None if start is None else hash_json([start.adapter_files, start.projectors, start.projector])
    return {
        **{"base": started.identity, "begun_from": {"weights": weights}, "language": held, "model": run},
        **{"finetunes": own, "trainer": steps, "data": order, "records": records, "tensors": tensors},
    }


def _settings(settings: Any) -> dict[str, Any]:
    """Without what checkpoints of earlier versions do not have, where it is as it was in them."""
    return {name: value for name, value in asdict(settings).items() if LATER.get(name, ...) != value}


def verify(checkpoint: dict[str, Any], belongs_to: dict[str, Any], answering: bool = False) -> None:
    """Parts that checkpoints of earlier versions do not have are not compared.

    Args:
        checkpoint: as it was read.
        belongs_to: what it is to be loaded into.
        answering: whether nothing is trained with it: its weights alone must fit then.

    Raises:
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
    was, here = saved["belongs_to"], {part: belongs_to[part] for part in saved["belongs_to"]}
    if answering:
        was, here = _of_weights(was), _of_weights(here)
    changed = _changed_data(was, here)
    lines = differences({**was, "records": {}}, {**here, "records": {}}, label="the checkpoint has") + changed
    if lines:
        shown = "\n".join(lines[:12]) + (f"\n  and {len(lines) - 12} more" if len(lines) > 12 else "")
        mend = "Put the data back as it was" if lines == changed else "Resume with the run's own settings"
        raise RefusedError(
            f"the checkpoint does not fit this run:\n{shown}\n{mend}, or begin a new run from its results with "
            "--model.start_from"
        )


def _changed_data(was: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """A line for each finetune whose files hold something else now, as far as the checkpoint knows what they held."""
    lines = []
    for name, held in was.get("records", {}).items():
        if held != here["records"].get(name):
            own = here["finetunes"].get(name, {}).get("data", {})
            files = ", ".join(map(str, own.get("train") or here["data"]["train"]))
            lines.append(
                f"  records.{name}: the checkpoint has learnt from other data than there is now in {files}: a row, an "
                "image or their order has changed"
            )
    return lines


def verify_end(checkpoint: dict[str, Any], trainer: Any) -> None:
    """Raises:
    RefusedError: it holds weights alone, or more steps were taken than the run is to have: Lightning would train
        nothing, and the checkpoint's weights would be written as those of the fewer steps.
    """
    if missing := sorted(OF_A_FIT - checkpoint.keys()):
        raise RefusedError(
            f"this checkpoint has no {missing[0]}, as one of weights alone (save_weights_only): a fit goes on from "
            "whole ones; --resume finds the newest"
        )
    taken = checkpoint["global_step"]
    if 0 <= trainer.max_steps < taken:
        raise RefusedError(
            f"trainer.max_steps is {trainer.max_steps}, but the checkpoint has taken {taken} steps; set it to {taken} "
            "or more, or begin a new run"
        )


def _of_weights(belongs_to: dict[str, Any]) -> dict[str, Any]:
    """What the weights mean, however they were come by."""
    adapters = {name: own["adapter"] for name, own in belongs_to["finetunes"].items()}
    return {"base": belongs_to["base"], "finetunes": adapters, "tensors": belongs_to["tensors"]}


def restore_rng(rng: dict[str, Any]) -> None:
    """Puts the generators back where the checkpoint left them."""
    torch.set_rng_state(rng["torch"])
    states = rng["cuda"]  # of all devices where an earlier version wrote it
    if states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states[torch.cuda.current_device() % len(states)])

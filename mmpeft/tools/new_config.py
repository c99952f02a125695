"""A config from three answers, data, base and goal: what is sensible is decided here, and where each number is from."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from mmpeft.adapters import AdapterConfig, IA3Config, LoraConfig
from mmpeft.data.formats.splits import split_in_name
from mmpeft.errors import RefusedError
from mmpeft.models.vision_config import VisionConfig
from mmpeft.options import command_line
from mmpeft.paths import VISION_WEIGHTS
from mmpeft.runs.manifest import MANIFEST, read_manifest
from mmpeft.tools.data_facts import DataFacts
from mmpeft.tools.image_survey import ImageSurvey

Goal = Literal["answer", "keep", "few", "caption"]
GOALS: dict[str, str] = {
    "answer": "questions answered, or captions written, as well as can be: LoRA on q and v",
    "keep": "the same, forgetting as little as can be of what the base knows: LoRA on the attention alone",
    "few": "a few examples of each class, of which each row lists all as choices: T-Few",
    "caption": "images read at all: the projector alone, on captions; stage 1, before any of the others",
}
LORA = {"rank": 16, "alpha": 32}
METHODS: dict[str, tuple[type[AdapterConfig], dict[str, Any]]] = {
    "answer": (LoraConfig, LORA),
    "keep": (LoraConfig, LORA | {"target_modules": "attention"}),
    "few": (IA3Config, {}),
}
"""Goal -> what it trains beside the projector, and its settings."""
LARGE = 1_000_000_000
"""Parameters from which on LoRA learns at 2e-4, as QLoRA's up to 13B (Dettmers et al. 2023, table 9), else at 1e-3."""
SEEN, MOST_EPOCHS = 6_000, 20
"""Conversations that a training sees in all, where so many epochs are enough for it; at least one epoch."""
FEW_STEPS, FEW_BATCH = 1_000, 8
"""T-Few's (Liu et al. 2022, section 4.1)."""
BYTES_EACH = 4
"""Twice those of a parameter in 16 bits: a base for which there is less room is held in 4 bits."""
BATCH = 16
SHARED = 8
"""Most conversations about one image that are packed into one row."""


@dataclass
class Found:
    """What was found of data and base."""

    facts: DataFacts
    images: ImageSurvey
    parameters: int
    """Of the language model."""
    longest: int
    """Tokens of the longest conversation."""
    positions: int | None
    """Most tokens that the language model reads; None is not limited."""
    has_choices: bool
    """Whether every row has."""
    room: int
    """Bytes that the device that trains has; 0 is not known."""


def other_split(train: str, split: str) -> str | None:
    """The file or folder beside the training data whose name says another split, where the rest of it is the same."""
    path = Path(train)
    if split_in_name(path) != "train":
        return None
    words = {"validation": ("validation", "valid", "val", "dev"), "test": ("test", "testing")}[split]
    for word in words:
        for old in ("training", "train"):
            other = path.with_name(re.sub(rf"(?<![^\W\d_]){old}(?![^\W\d_])", word, path.name))
            if other != path and other.exists():
                return str(other)
    return None


def make_config(
    data: str,
    base: str,
    goal: str,
    found: Found,
    directory: str,
    start_from: str | None = None,
    vision: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The settings.

    Args:
        vision: as model.vision; by default the embedded encoder.

    Raises:
        RefusedError: data that do not suit the goal, or a base that does not.
    """
    _check_goal(goal, found, data, start_from)
    few, sees = goal == "few", bool(found.images.named)
    language: dict[str, Any] = {"name": base}
    if found.room and BYTES_EACH * found.parameters > found.room:
        language["quantization"] = "nf4"
    model: dict[str, Any] = {
        "language": language,
        "vision": (vision or vision_settings(None)) if sees else None,
    }
    if goal in METHODS:
        method, own = METHODS[goal]
        model["adapter"] = {"class_path": f"mmpeft.adapters.{method.__name__}", "init_args": {**own}}
        model["learning_rate"] = 3e-3 if few else 2e-4 if found.parameters >= LARGE else 1e-3
    model |= {"optimizer": "adafactor", "schedule": "linear", "warmup": 0.06} if few else {"warmup": 0.03}
    if sees:
        model |= {"start_from": start_from, "projector_learning_rate": 1e-3, "train_projector": not few}
    section: dict[str, Any] = {
        "train": data,
        "val": other_split(data, "validation"),
        "test": other_split(data, "test"),
    }
    shared = max(1, min(SHARED, found.facts.conversations // max(1, found.images.distinct))) if sees else 4
    batch = FEW_BATCH if few else BATCH * (2 if shared >= 3 else 1)
    length = min(found.positions or math.inf, max(256, 64 * math.ceil(found.longest / 64)))
    section["packing"] = {
        "batch_size": batch,
        "max_conversations": 1 if few else shared,
        "max_length": int(length),
    }
    epochs = max(1, min(MOST_EPOCHS, round(SEEN / max(1, found.facts.conversations))))
    trainer: dict[str, Any] = {"default_root_dir": directory}
    trainer |= {"max_steps": FEW_STEPS} if few else {"max_epochs": epochs}
    return {"model": model, "data": section, "trainer": trainer}


def written(config: dict[str, Any], path: str, told: list[str]) -> str:
    """The config as YAML, with the command and what was told of it above."""
    head = [command_line("fit", "--config", path), *told]
    return "".join(f"# {line}\n" for line in head) + yaml.safe_dump(
        config, sort_keys=False, allow_unicode=True
    )


def remarks(config: dict[str, Any], found: Found, goal: str) -> Iterator[str]:
    """What to know of it."""
    data = config["data"]
    yield f"{GOALS[goal]}."
    missing = [split for split in ("val", "test") if data[split] is None]
    if missing:
        named = " and ".join(f"data.{split}" for split in missing)
        yield f"No {named} lies beside {data['train']}: without, nothing tells how good the finetune is."
    if config["model"]["vision"] and goal != "caption" and config["model"]["start_from"] is None:
        yield "The projector begins from nothing: a stage 1 on captions (--goal caption) before it is model.start_from."
    if data["packing"]["max_length"] < found.longest:
        yield f"Conversations of up to {found.longest} tokens are cut at the model's {found.positions} positions."


def check_goal(goal: str) -> None:
    """Raises:
    RefusedError: there is no such goal.
    """
    if goal not in get_args(Goal):
        raise RefusedError(f"--goal is {goal!r}; it is one of {', '.join(get_args(Goal))}")


def _check_goal(goal: str, found: Found, data: str, start_from: str | None) -> None:
    check_goal(goal)
    if goal == "few" and not found.has_choices:
        raise RefusedError(
            f"--goal few learns from wrong choices too, but not all rows of {data} have choices: add them "
            "(docs/data.md), or take --goal answer"
        )
    if goal == "caption" and not found.images.named:
        raise RefusedError(
            f"--goal caption trains the projector of images, and {data} names none; take --goal answer"
        )
    if start_from is not None and not found.images.named:
        raise RefusedError(
            f"--start_from is the run of a projector, but {data} names no images; leave it out"
        )
    if start_from is not None:
        read_manifest(start_from)  # which refuses what is no run


def vision_settings(encoder: str | None) -> dict[str, Any]:
    """Of model.vision: the embedded encoder, or a timm model with its own weights."""
    if encoder is None:
        return {"name": "tf_efficientnet_lite0", "weights": VISION_WEIGHTS, "image_size": 224}
    return {"name": encoder}


def vision_of_run(run: str | None) -> dict[str, Any] | None:
    """Of model.vision as a run has it, without what is everywhere; None where there is no such run, or it sees none."""
    own = read_manifest(run).vision if run is not None and Path(run, MANIFEST).exists() else None
    usual = json.loads(json.dumps(asdict(VisionConfig())))
    return own and {name: value for name, value in own.items() if name == "name" or value != usual[name]}

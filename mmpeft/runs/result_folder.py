"""Where the results of a test or a prediction go: results of other settings never take each other's place."""

import json
import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import yaml

from mmpeft.hashing import flat, hash_json
from mmpeft.runs.layout import CONFIG, TESTS, config_of

LONGEST = 100
"""Characters of a folder's name."""
SPLITS = ("train", "val", "test", "predict")
OF_A_FIT = (
    *("seed_everything", "data.weights", "data.shots", "data.shots_seed", "data.seed"),
    *(
        "model.adapter.init_args.*",
        "model.learning_rate",
        "model.projector_learning_rate",
        "model.weight_decay",
    ),
    *("model.schedule", "model.warmup", "model.optimizer", "model.choice_losses*", "model.seed"),
    *("model.objective", "model.preferences*"),
    *(
        "model.max_steps",
        "model.shots_seed",
        "model.train_projector",
        "model.start_from",
        "model.start_adapter",
    ),
    *("trainer.m??_epochs", "trainer.m??_steps", "trainer.max_time", "trainer.overfit_batches"),
    *("trainer.val_check_interval", "trainer.check_val_every_n_epoch", "trainer.num_sanity_val_steps"),
    *(
        "trainer.gradient_clip_*",
        "trainer.accumulate_grad_batches",
        "trainer.reload_dataloaders_every_n_epochs",
    ),
)
"""Settings of what a test finds done."""
IDENTIFIED = ("model.vision", "model.vision.*", "model.language.name")
"""The base, which is known by its hashes."""
OF_THE_COURSE = (
    *(
        "data.cache",
        "data.cache.*",
        "data.packing.batch_size",
        "data.packing.max_conversations",
        "trainer.default_root_dir",
    ),
    *("model.language.gradient_checkpointing", "trainer.devices", "trainer.num_nodes"),
    *("trainer.strategy", "trainer.benchmark"),
    *("trainer.logger*", "trainer.callbacks", "trainer.log_every_n_steps", "trainer.enable_*"),
    *("trainer.profiler*", "trainer.detect_anomaly", "trainer.barebones", "trainer.model_registry"),
    *("trainer.fast_dev_run", "test.held_*"),  # one writes nothing, the others are for --forgetting
)
"""How a test goes on, and what it shows."""
OF_A_SPLIT = ("data.%s", "model.%s", "trainer.limit_%s_batches")
PASSED_OVER = (*OF_A_FIT, *IDENTIFIED, *OF_THE_COURSE)
"""What cannot change the answers of a finetune that is there. Every other setting can: a new one counts until it
stands here."""


def results_folder(
    run: Path,
    split: Literal["test", "predict"],
    wanted: Mapping[str, Any],
    defaults: Mapping[str, Any],
    output: str | None = None,
) -> Path:
    """The run directory itself for its own test: all of its own data, as its ``config.yaml`` says. Anything else goes
    to ``tests/`` in it, in a folder named by what differs: ``tests/limit=50``, ``tests/test=other.jsonl-3fa21c``.

    Where the run's config names no data for the split, the first that are given are its own.

    Args:
        run: the run's directory.
        split: whether it is a test or a prediction.
        wanted: the config of this test, and ``ckpt_path`` where it answers with other weights.
        defaults: of the settings that the run's config, of an earlier version, does not have.
        output: chosen by the user; it is taken as it is.
    """
    if output is not None:
        return Path(output)
    if not (own := _read(run / CONFIG)):
        return run
    data, most = f"data.{split}", f"trainer.limit_{split}_batches"
    usual = _deciding(defaults, split) | _deciding(own, split)
    asked = _deciding(wanted, split)
    if usual.get(data) is None:
        usual[data] = _deciding(_read(run / config_of(split)), split).get(data) or asked.get(data)
    usual |= {"data.limit": None, most: None}  # all of the data, however few the run was trained on
    differing = {
        key.partition(".")[2] or key: asked.get(key)
        for key in {**usual, **asked}
        if asked.get(key) != usual.get(key)
    }
    if not differing:
        return run
    name = ",".join(f"{key}={_short(value)}" for key, value in sorted(differing.items()))
    if split != "test":
        name = f"{split}:{name}"
    name = re.sub(r"[^\w.,=+:-]", "_", name)
    return run / TESTS / (name if len(name) <= LONGEST else f"{name[:LONGEST]}-{hash_json(differing)[:6]}")


def _deciding(config: Mapping[str, Any], split: str) -> dict[str, Any]:
    """Path -> setting, of those that can change the answers or their figures."""
    model = dict(config.get("model") or {})
    finetunes = model.pop("adapters", None) or {}
    own = {f"model.adapters.{name}": flat(settings, "model.") for name, settings in finetunes.items()}
    whole = {key: value for key, value in flat({**config, "model": model}).items() if _decides(key, split)}
    return whole | {
        f"{place}.{key.removeprefix('model.')}": value
        for place, settings in own.items()
        for key, value in settings.items()
        if _decides(key, split)
    }


def _decides(key: str, split: str) -> bool:
    if any(fnmatchcase(key, pattern) for pattern in PASSED_OVER):
        return False
    of_splits = {place % each: each for each in SPLITS for place in OF_A_SPLIT}
    return of_splits.get(key, split) == split


def _short(value: Any) -> str:
    """A value in few letters; of paths the last part, and a hash that tells them apart."""
    values = value if isinstance(value, list) else [value]
    names = "+".join(Path(str(each)).name for each in values)
    return f"{names}-{hash_json(value)[:6]}" if "/" in json.dumps(value) else names


def _read(path: Path) -> dict[str, Any]:
    return (yaml.safe_load(path.read_text()) or {}) if path.is_file() else {}

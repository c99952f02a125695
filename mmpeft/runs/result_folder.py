"""Where the results of a test or a prediction go: results of other settings never take each other's place."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from mmpeft.hashing import hash_json
from mmpeft.runs.layout import CONFIG, TESTS, config_of

LONGEST = 100
"""Characters of a folder's name."""


def results_folder(
    run: Path, split: Literal["test", "predict"], wanted: Mapping[str, Any], output: str | None = None
) -> Path:
    """The run directory itself for its own test: all of its own data, as its ``config.yaml`` says. Anything else goes
    to ``tests/`` in it, in a folder named by what differs: ``tests/limit=50``, ``tests/test=other.jsonl-3fa21c``.

    Where the run's config names no data for the split, the first that are given are its own.

    Args:
        run: the run's directory.
        split: whether it is a test or a prediction.
        wanted: the config of this test.
        output: chosen by the user; it is taken as it is.
    """
    if output is not None:
        return Path(output)
    if not (own := _read(run / CONFIG)):
        return run
    first = _deciding(_read(run / config_of(split)), split)
    asked, trained = _deciding(wanted, split), _deciding(own, split)
    usual = {key: first.get(key) if value is None else value for key, value in trained.items()} or first
    usual["limit"] = None  # all of the data, however few the run was trained on
    differing = {
        key: value
        for key, value in asked.items()
        if value != usual.get(key) and not (key == split and usual.get(key) is None)
    }
    if not differing:
        return run
    name = ",".join(f"{key}={_short(value)}" for key, value in sorted(differing.items()))
    if split != "test":
        name = f"{split}:{name}"
    name = re.sub(r"[^\w.,=+:-]", "_", name)
    return run / TESTS / (name if len(name) <= LONGEST else f"{name[:LONGEST]}-{hash_json(differing)[:6]}")


def _deciding(config: Mapping[str, Any], split: str) -> dict[str, Any]:
    """The settings that decide about the answers and their figures."""
    if not config:
        return {}
    data, model = config.get("data") or {}, config.get("model") or {}
    found = {key: data.get(key) for key in ("limit", "image_root", "task", split)}
    found |= {key: value for key, value in (config.get("test") or {}).items() if key != "held_text"}
    adapters = model.get("adapters")
    return found | {"adapters": sorted(adapters) if adapters else None}


def _short(value: Any) -> str:
    """A value in few letters; of paths the last part, and a hash that tells them apart."""
    values = value if isinstance(value, list) else [value]
    names = "+".join(Path(str(each)).name for each in values)
    return f"{names}-{hash_json(value)[:6]}" if "/" in json.dumps(value) else names


def _read(path: Path) -> dict[str, Any]:
    return (yaml.safe_load(path.read_text()) or {}) if path.is_file() else {}

"""The plan of a sweep: which settings train side by side, and the config of the joint run that they become."""

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import product
from typing import Any

import yaml

from mmpeft.errors import RefusedError, require_positive
from mmpeft.experiments.steps import Settings, read_settings

ADAPTER = "model.adapter"
OWN = (
    *("model.learning_rate", "model.projector_learning_rate", "model.weight_decay"),
    *("model.schedule", "model.warmup", "model.lora_b_ratio", "data.train", "data.shots_seed"),
)
"""Settings that each finetune of a joint run may have of its own, beside its adapter."""
NOT_COMPARED = {
    **dict.fromkeys(
        ("model.choice_losses", "model.objective", "model.preferences"),
        "it changes the loss by which settings are compared",
    ),
    "data.val": "settings are compared by their loss on the same validation data",
    "data.test": "settings are compared by their loss on data.val",
    "trainer.max_steps": "settings are compared after the same steps",
    "model.seed": "for several seeds of every setting give --seeds",
    "data.seed": "for several seeds of every setting give --seeds",
}
"""What may not differ although a joint run could, or why it need not."""
NUMBER = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
"""What YAML takes for text without a dot or the exponent's sign: 1e-4."""
CALLBACK = "mmpeft.training.halving.SuccessiveHalving"
LONGEST_NAME = 48
Values = dict[str, Any]
"""Key of the config, such as "model.learning_rate" -> its value."""


@dataclass
class Plan:
    """Settings that are compared, by name."""

    base: Settings
    """The config, with what is the same for all."""
    settings: dict[str, Values]
    """What is each one's own."""
    seeds: int = 1

    @property
    def finetunes(self) -> dict[str, list[str]]:
        """Setting -> the finetunes of it, one for every seed."""
        if self.seeds == 1:
            return {name: [name] for name in self.settings}
        return {name: [f"{name}-seed{seed}" for seed in range(self.seeds)] for name in self.settings}

    def joint(self, directory: str, keep: float, at: list[int] | None) -> Settings:
        """The config of the joint run, in which the settings are halved."""
        entries: Settings = {}
        for setting, names in self.finetunes.items():
            for seed, name in enumerate(names):
                own = self.alone(setting)
                entry = {
                    key.partition(".")[2]: own_value(own, key) for key in self.settings[setting] if key in OWN
                }
                entries[name] = {"adapter": own["model"]["adapter"]} | entry
                entries[name] |= {"seed": seed} if self.seeds > 1 else {}
        joint = deepcopy(self.base)
        joint["model"] = {**joint["model"], "adapter": None, "adapters": entries}
        halving = {"class_path": CALLBACK, "init_args": {"settings": self.finetunes, "keep": keep, "at": at}}
        callbacks = [*(joint["trainer"].get("callbacks") or []), halving]
        joint["trainer"] |= {"default_root_dir": directory, "callbacks": callbacks}
        return joint

    def alone(self, setting: str) -> Settings:
        """The config of one setting as a run of its own."""
        config = deepcopy(self.base)
        for key in sorted(self.settings[setting]):  # an adapter before what is to be other of it
            put(config, key, self.settings[setting][key])
        return config

    @property
    def train_files(self) -> list[str]:
        """Training data of single settings."""
        given = [values["data.train"] for values in self.settings.values() if "data.train" in values]
        return [path for own in given for path in ([own] if isinstance(own, str) else own)]


def make_plan(config: str, words: Sequence[str], listed: str | None = None, seeds: int = 1) -> Plan:
    """The settings that a command line names.

    Args:
        config: YAML of `mmpeft fit` with one adapter.
        words: ``--key value`` or ``--key=value``; a list of values is a dimension of the grid, any other
            value is for all.
        listed: YAML list of settings in place of the grid, or beside it: each with all of the grid.
        seeds: how often every setting is trained.

    Raises:
        RefusedError: a key that cannot differ within a joint run, or nothing to compare.
    """
    require_positive("--seeds", seeds)
    base = read_settings(config)
    grid: dict[str, list[Any]] = {}
    for key, text in _pairs(words):
        value = read_value(text, f"--{key}")
        if isinstance(value, list):
            _check_key(key)
            grid[key] = _distinct(key, value)
        else:
            put(base, key, value)
    settings = [
        own | dict(zip(grid, values, strict=True))
        for own in _listed(listed)
        for values in product(*grid.values())
    ]
    _check(base, settings, config)
    return Plan(base, _named(settings), seeds)


def put(config: Settings, key: str, value: Any) -> None:
    """Sets a key of a nested config as the command line does: `model.adapter.rank` is among the adapter's init_args."""
    parts = key.split(".")
    if key.startswith(f"{ADAPTER}.") and parts[2] not in ("class_path", "init_args"):
        adapter = config["model"].get("adapter")
        config["model"]["adapter"] = adapter = (
            {"class_path": adapter} if isinstance(adapter, str) else adapter
        )
        if not adapter:
            raise RefusedError(f"--{key} is a setting of which adapter? Give the config a {ADAPTER}")
        parts.insert(2, "init_args")
    for number, part in enumerate(parts[:-1], start=1):
        config[part] = config.get(part) or {}
        config = config[part]
        if not isinstance(config, dict):
            where = ".".join(parts[:number])
            raise RefusedError(f"--{key}: {where} is {config!r}, which has no settings of its own")
    config[parts[-1]] = deepcopy(value)  # settings of one adapter share it, and each puts its own into it


def own_value(config: Settings, key: str) -> Any:
    """The value of a key of a nested config; None where there is none."""
    found: Any = config
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def read_value(text: str, where: str) -> Any:
    """A value as YAML has it, 1e-4 being a number.

    Raises:
        RefusedError: it is no YAML.
    """
    try:
        return _numbers(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise RefusedError(
            f"{where} is {text!r}, which is no YAML: {getattr(error, 'problem', error)}"
        ) from None


def _numbers(value: Any) -> Any:
    if isinstance(value, list):
        return [_numbers(each) for each in value]
    if isinstance(value, dict):
        return {key: _numbers(each) for key, each in value.items()}
    return float(value) if isinstance(value, str) and NUMBER.fullmatch(value) else value


def _pairs(words: Sequence[str]) -> list[tuple[str, str]]:
    pairs, rest = [], [*words]
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--") or not (equals or rest):
            raise RefusedError(
                f"{name!r} is no setting with a value, such as --model.learning_rate '[1e-4,1e-3]'"
            )
        pairs.append((name.removeprefix("--"), value if equals else rest.pop(0)))
    return pairs


def _listed(text: str | None) -> list[Values]:
    if text is None:
        return [{}]
    found = read_value(text, "--settings")
    if not isinstance(found, list) or not all(isinstance(each, dict) and each for each in found):
        raise RefusedError(
            "--settings is a list of settings, each with its keys, such as '[{model.learning_rate: 1e-3, "
            f"model.adapter.rank: 4}}, {{...}}]'; found {text!r}"
        )
    for key in (key for each in found for key in each):
        _check_key(str(key))
    return found


def _check_key(key: str) -> None:
    """Raises:
    RefusedError: it cannot differ within a joint run.
    """
    if key in OWN or key == ADAPTER or key.startswith(f"{ADAPTER}."):
        return
    may = ", ".join([*OWN, ADAPTER, f"{ADAPTER}.*"])
    why = next((why for name, why in NOT_COMPARED.items() if key == name or key.startswith(f"{name}.")), None)
    near = get_close_matches(key, [*OWN, ADAPTER], n=1, cutoff=0.8)
    reason = why or (
        f"the closest that can is {near[0]}" if near else "it is one for all finetunes of a joint run"
    )
    raise RefusedError(
        f"--{key} cannot differ between the settings of a sweep: {reason}. What can: {may}. A list that is one "
        "value for all stands in the config"
    )


def _distinct(key: str, values: list[Any]) -> list[Any]:
    double = [value for number, value in enumerate(values) if value in values[:number]]
    if double or not values:
        raise RefusedError(
            f"--{key} has {values}; " + (f"{double[0]} is there twice" if double else "it is empty")
        )
    return values


def _check(base: Settings, settings: Sequence[Values], config: str) -> None:
    """Raises:
    RefusedError: there is nothing to compare, or nothing to compare it by.
    """
    if base["model"].get("adapters"):
        raise RefusedError(f"{config} is a joint run already; a sweep wants one adapter, {ADAPTER}, to vary")
    if not all(own.get(ADAPTER, base["model"].get("adapter")) for own in settings):
        raise RefusedError(f"{config} has no {ADAPTER}; a sweep trains one finetune of it for every setting")
    if not base["data"].get("val"):
        raise RefusedError(
            f"settings are compared by validation loss, but {config} has no data.val: give --data.val"
        )
    if len(settings) < 2:
        found = "one setting" if settings else "no setting"
        raise RefusedError(
            f"found {found}; wanted two or more to compare, such as --model.learning_rate '[1e-4,1e-3]'"
        )
    for number, own in enumerate(settings):
        if own in settings[:number]:
            raise RefusedError(f"the setting {own} is there twice")
    for callback in base["trainer"].get("callbacks") or []:
        if watched := own_value({"callback": callback}, "callback.init_args.monitor"):
            raise RefusedError(
                f"trainer.callbacks: {shown(callback)} watches {watched!r}, which a sweep has once for every setting, "
                f"as {watched}/NAME; take it out of {config} for the sweep"
            )


def _named(settings: Sequence[Values]) -> dict[str, Values]:
    """Names that a folder can have, from keys and values."""
    found: dict[str, Values] = {}
    for number, own in enumerate(settings, start=1):
        told = "-".join(f"{key.rpartition('.')[2]}{shown(value)}" for key, value in own.items())
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", told).strip(".-")[:LONGEST_NAME]
        found[name if name and name not in found else f"setting{number}"] = own
    return found


def shown(value: Any) -> str:
    """A value in a name and in a table."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return str(value.get("class_path", value)).rpartition(".")[2]
    return "+".join(map(shown, value)) if isinstance(value, list) else str(value)

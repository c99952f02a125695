"""Few-shot runs over several seeds: every seed is a finetune of one joint run, and the table shows their spread."""

import statistics
from collections.abc import Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from mmpeft.errors import RefusedError, require_positive
from mmpeft.experiments.steps import (
    Settings,
    evaluate_once,
    files_of,
    fit_once,
    merged,
    read_metrics,
    read_settings,
    weights_of,
)
from mmpeft.files import write_json
from mmpeft.runs.layout import MANIFEST

METRIC = "accuracy"


def few_shot(
    configs: list[str],
    shots: int = 16,
    seeds: int = 5,
    max_steps: int | None = None,
    output: str = "runs/few_shot",
) -> None:
    """Trains on a few examples of every class, once per seed, and prints median and interquartile range.

    All seeds of a config train side by side on one base, each as it would alone. Rows with `choices` are answered
    by ranking them; the classes are those choices.

    Args:
        configs: YAML files of `mmpeft fit`, such as [configs/tfew.yaml,configs/few_shot_lora.yaml].
        shots: training examples of every class.
        seeds: how often, each time with other examples.
        max_steps: in place of the configs' own.
        output: folder for the runs.
    """
    from rich.console import Console

    from mmpeft.reporting.tables import make_table

    require_positive("--seeds", seeds)
    places = dict[Path, str]()
    for config in configs:
        directory = _directory(config, output)
        if (other := places.setdefault(directory, config)) != config:
            raise RefusedError(f"{other} and {config} would both go into {directory}; rename one of them")
        _check(config, directory, shots, range(seeds), max_steps)
    rows = [run_seeds(config, shots, range(seeds), output, max_steps) for config in configs]
    write_json(Path(output) / "few_shot.json", rows)
    figures = ("untrained", "median", "interquartile range", "lowest", "highest")
    columns = {"config": "left"} | dict.fromkeys(figures, "right")
    table = make_table(f"{shots} examples of every class, {seeds} seeds: {METRIC}", **columns)
    for row in rows:
        values = row["accuracies"]
        low, middle, high = quartiles(values)
        cells = (row["untrained"], middle, high - low, min(values), max(values))
        table.add_row(row["name"], *(f"{cell:.3f}" for cell in cells))
    Console().print(table)


def run_seeds(
    config: str, shots: int, seeds: Sequence[int], output: str, max_steps: int | None = None
) -> dict[str, Any]:
    """Trains one finetune per seed, each on its own ``shots`` examples of every class, and tests all.

    What was trained or tested before with the same settings and data is not done again.

    Args:
        config: YAML of `mmpeft fit` with one adapter and data whose answers are classes.
        output: folder; the run goes into one named after the config.

    Returns:
        {"name", "untrained": accuracy before training, "accuracies": one for every seed}

    Raises:
        RefusedError: a config without an adapter, answers that are no classes, or a folder with other results.
    """
    directory = _directory(config, output)
    untrained, joint = _settings(config, directory, shots, seeds, max_steps)
    made_from = files_of(untrained)
    before, after = directory / "untrained", directory / "seeds"
    evaluate_once(untrained, made_from | {key: untrained.get(key) for key in ("model", "data", "test")})
    if METRIC not in read_metrics(before):
        raise RefusedError(f"the answers of {config}'s data.test are no classes: give its rows choices")
    fit_once(joint, made_from)
    tested = made_from | {"settings": joint, "weights": weights_of(after)}
    evaluate_once(joint, tested, config=directory / "seeds_test.yaml")
    figures = read_metrics(after)
    keys = [f"{METRIC}/seed{seed}" for seed in seeds] if len(seeds) > 1 else [METRIC]
    accuracies = [figures[key] for key in keys]
    return {"name": directory.name, "untrained": read_metrics(before)[METRIC], "accuracies": accuracies}


def _directory(config: str, output: str) -> Path:
    """Of a config's runs."""
    named = [part for part in Path(config).with_suffix("").parts[-2:] if part != "configs"]
    return Path(output) / "_".join(named)


def _check(config: str, directory: Path, shots: int, seeds: Sequence[int], max_steps: int | None) -> None:
    """Reads the data of what is not trained yet, so that all is refused before anything is answered or trained.

    Raises:
        RefusedError: settings or rows that `mmpeft fit` refuses, or fewer examples of a class than ``shots``.
    """
    _, joint = _settings(config, directory, shots, seeds, max_steps)
    if (directory / "seeds" / MANIFEST).exists():
        return
    from mmpeft.training.cli import VisionLanguageCLI

    with TemporaryDirectory() as folder, redirect_stderr(StringIO()):  # what is set aside is told by the fit
        path = Path(folder, "config.yaml")
        path.write_text(yaml.safe_dump(joint, sort_keys=False, allow_unicode=True))
        cli = VisionLanguageCLI.parse(["--config", str(path)])
        cli.datamodule.read("fit", cli.model.finetunes)


def _settings(
    config: str, directory: Path, shots: int, seeds: Sequence[int], max_steps: int | None
) -> tuple[Settings, Settings]:
    """Of the model before training, and of all seeds' joint run."""
    settings = read_settings(config)
    adapter = settings["model"].pop("adapter", None)
    if adapter is None:
        raise RefusedError(f"{config} has no model.adapter; few-shot runs train one finetune of it per seed")
    if max_steps is not None:
        settings["trainer"]["max_steps"] = max_steps
    untrained = merged(settings, {"trainer": {"default_root_dir": str(directory / "untrained")}})
    adapters = {f"seed{seed}": {"adapter": adapter, "shots_seed": seed} for seed in seeds}
    own = {"model": {"adapters": adapters}, "data": {"shots": shots}}
    return untrained, merged(settings, own | {"trainer": {"default_root_dir": str(directory / "seeds")}})


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile; of a single value, that value."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high

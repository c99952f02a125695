"""Few-shot runs over several seeds: every seed is a finetune of one joint run, and the table shows their spread."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from mmpeft.errors import RefusedError
from mmpeft.training.cli import VisionLanguageCLI

METRIC = "accuracy"


def run_seeds(
    config: str, shots: int, seeds: Sequence[int], output: str, max_steps: int | None = None
) -> dict[str, Any]:
    """Trains one finetune per seed, each on its own ``shots`` examples of every class, and tests all.

    All seeds go through one base side by side, each as it would alone; only the examples differ between them.

    Args:
        config: YAML of `mmpeft fit` with one adapter and data whose answers are classes.
        shots: training examples of every class.
        seeds: which ones.
        output: folder; the run goes into one named after the config.
        max_steps: in place of the config's own.

    Returns:
        {"name", "untrained": accuracy before training, "accuracies": one for every seed}
    """
    settings = yaml.safe_load(Path(config).read_text())
    adapter = settings["model"].pop("adapter", None)
    if adapter is None:
        raise RefusedError(f"{config} has no model.adapter; few-shot runs train one finetune of it per seed")
    named = [part for part in Path(config).with_suffix("").parts[-2:] if part != "configs"]
    directory = Path(output) / "_".join(named)
    if max_steps is not None:
        settings["trainer"]["max_steps"] = max_steps
    settings["trainer"]["default_root_dir"] = str(directory / "untrained")
    untrained = _write(directory / "untrained.yaml", settings)
    settings["model"]["adapters"] = {
        f"seed{seed}": {"adapter": adapter, "shots_seed": seed} for seed in seeds
    }
    settings["data"]["shots"] = shots
    settings["trainer"]["default_root_dir"] = str(directory / "seeds")
    joint = _write(directory / "seeds.yaml", settings)
    VisionLanguageCLI.run(["test", "--config", untrained])
    if METRIC not in _metrics(directory / "untrained"):
        raise RefusedError(f"the answers of {config}'s data.test are no classes: give its rows choices")
    VisionLanguageCLI.run(["fit", "--config", joint])
    VisionLanguageCLI.run(["test", "--config", joint])
    before, after = _metrics(directory / "untrained"), _metrics(directory / "seeds")
    accuracies = [after[f"{METRIC}/seed{seed}"] for seed in seeds]
    return {"name": directory.name, "untrained": before[METRIC], "accuracies": accuracies}


def print_few_shot(
    configs: Sequence[str], shots: int, seeds: Sequence[int], output: str, max_steps: int | None = None
) -> None:
    """Runs every config and prints median and interquartile range over the seeds."""
    rows = [run_seeds(config, shots, seeds, output, max_steps) for config in configs]
    table = Table(title=f"{shots} examples of every class, {len(seeds)} seeds: {METRIC}")
    for column in ("config", "untrained", "median", "interquartile range", "lowest", "highest"):
        table.add_column(column, justify="left" if column == "config" else "right")
    for row in rows:
        values = row["accuracies"]
        low, middle, high = quartiles(values)
        figures = (row["untrained"], middle, high - low, min(values), max(values))
        table.add_row(row["name"], *(f"{figure:.3f}" for figure in figures))
    Console().print(table)
    (Path(output) / "few_shot.json").write_text(json.dumps(rows, indent=2) + "\n")


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile; of a single value, that value."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def _metrics(directory: Path) -> dict[str, float]:
    return json.loads((directory / "metrics.json").read_text())


def _write(path: Path, settings: dict[str, Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return str(path)

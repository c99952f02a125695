"""A race: functions that take turns in one process, and what is told of them."""

import ast
import json
import platform
import resource
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks import timing

CASES = Path(__file__).parent / "cases"
Run = Callable[[], Any]


@dataclass
class Race:
    """Functions whose figures are compared."""

    title: str
    runs: Mapping[str, Run]
    """Name -> what takes its turn. What it sets up in its first call is not measured."""
    against: tuple[str, ...] = ()
    """Runs that all are compared with: figure / their figure."""
    unit: str = "s"
    """Of the figure: the seconds of a run, or where it is another, such as "questions/s", ``amount`` by seconds."""
    amount: float = 1.0
    """What a run gets done."""
    measured: bool = False
    """Whether the runs return their figures instead of being timed."""
    repeats: int = 5
    """Rounds, unless the command says otherwise. With 0 the runs are long, or their first calls are what is asked: they
    are not called again for the memory that they take of a GPU."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What else is to be known of all runs."""
    told: Callable[[str, float], Mapping[str, Any]] = lambda name, seconds: {}
    """(run, its figure) -> what else is to be told of it."""


def case_names() -> list[str]:
    """The cases that there are."""
    return sorted(path.stem for path in CASES.glob("[a-z]*.py"))


def case_function(name: str) -> Callable[..., Any]:
    """What gives a case's races; its arguments are the case's options."""
    return getattr(import_module(f"benchmarks.cases.{name}"), name)


def what(case: str) -> str:
    """What a case is about: its file's docstring."""
    return ast.get_docstring(ast.parse((CASES / f"{case}.py").read_text())) or ""


def measure(race: Race, repeats: int | None, only: str = "") -> list[dict[str, Any]]:
    """The rows of a race: of every run its median figure, from lowest to highest, and its ratios."""
    runs = {name: run for name, run in race.runs.items() if only in name}
    watch = timing.returned if race.measured else timing.seconds
    values = timing.alternate(runs, race.repeats if repeats is None else repeats, watch)
    figures = {name: [_figure(race, value) for value in own] for name, own in values.items()}
    settled = torch.cuda.is_available() and race.repeats > 0
    memory = {name: timing.gpu_memory(run) for name, run in runs.items()} if settled else {}
    medians = {name: statistics.median(own) for name, own in figures.items()}
    rows = []
    for name, median in medians.items():
        ratios = {other: round(median / medians[other], 3) for other in race.against if other in medians}
        row = {"race": race.title, "run": name, "unit": race.unit, "median": _round(median)}
        row |= {"lowest": _round(min(figures[name])), "highest": _round(max(figures[name])), "ratios": ratios}
        if name in memory:
            row["added_gb"] = _round(memory[name])
        rows.append(row | dict(race.facts) | dict(race.told(name, median)) | machine())
    return rows


def _figure(race: Race, value: float) -> float:
    if race.measured or race.unit == "s":
        return value
    return race.amount / value


def _round(figure: float) -> float:
    return float(f"{figure:.4g}")


def report(row: Mapping[str, Any], file: str | None = None) -> None:
    """Prints a row as a line of JSON, and appends it to a file."""
    line = json.dumps(row)
    print(line, flush=True)
    if file is not None:
        with Path(file).open("a") as lines:
            lines.write(line + "\n")


def machine() -> dict[str, Any]:
    """Where it was measured, and the process's highest memory so far, in MB."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2**20 if platform.system() == "Darwin" else 1024
    )
    return {"threads": torch.get_num_threads(), "cpu": processor(), "gpu": gpu, "peak_mb": round(peak)}


def processor() -> str:
    """The processor's name, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()

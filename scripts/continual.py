"""Finetunes in phases, and what each left of the ones before: ``python scripts/continual.py PLAN``.

A plan names phases, each an `mmpeft fit`, and data sets that are answered before the first and after every phase::

    output: runs/facts
    phases:
      learn: {config: configs/continual/facts_learn.yaml}
      same: {config: configs/continual/facts_update.yaml, after: learn}     # goes on with learn's finetune
      new:                                                                 # a finetune of its own beside it
        config: configs/continual/facts_update.yaml
        after: learn
        settings: {model: {adapter_name: update}}
    measure:
      unchanged: {test: embedded/facts/unchanged.jsonl, learnt_in: learn}
      ask_new: {test: embedded/facts/ask_new.jsonl}

A phase goes on training the finetune of the phase it comes after if it has the same model.adapter_name; under another
name it begins one of its own, and OUTPUT/PHASE/together holds both, so that every row of a batch may ask either. With
the projector frozen (model.train_projector: false) the older one then answers to the bit as before.

    OUTPUT/PHASE/                         the run directory of a phase, OUTPUT/PHASE.yaml its config
    OUTPUT/measured/PHASE/FINETUNE/DATA/  predictions.jsonl and metrics.json of one cell of the table
    OUTPUT/table.md matrix.png results.json

Started again, it goes on: what was trained or measured is not done twice.
"""

import hashlib
import json
import re
import shutil
import sys
from argparse import ArgumentError, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from mmpeft.cli import main
from mmpeft.hashing import differences, hash_json
from mmpeft.paths import resolve
from mmpeft.runs.files import PROJECTOR
from mmpeft.runs.manifest import MANIFEST, read_manifest, write_manifest
from scripts.continual_table import Row, draw_matrix, how_to_ask, matrix, what_became

BEFORE = "before"
"""In place of a phase: nothing has been trained yet."""
MEASURED, TOGETHER = "measured", "together"
NAME = re.compile(r"[A-Za-z0-9][\w-]*")
METRIC = "exact_match"


@dataclass
class Phase:
    """One `mmpeft fit`."""

    config: str
    """YAML of the run."""
    after: str | None = None
    """The phase whose run it begins from; the first phase begins from its own model.start_from, or the base."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What is to be different from the config, nested as there."""


@dataclass
class DataSet:
    """Questions that are answered after every phase."""

    test: str
    """Data file, as data.test."""
    learnt_in: str | None = None
    """The phase that teaches them, after which they should stay right: what is lost later is forgetting."""
    limit: int | None = None
    """Only so many of the questions."""


@dataclass
class Plan:
    """Phases and what is measured after each.

    Raises:
        ValueError: a name cannot be a folder's, or a phase is named that is not there.
    """

    output: str
    """Folder for the runs and results."""
    phases: dict[str, Phase]
    """By name, every phase below the one it comes after; the first comes after none."""
    measure: dict[str, DataSet]
    """By name."""

    def __post_init__(self) -> None:
        if not self.phases or not self.measure:
            raise ValueError("found no phases or nothing to measure; wanted at least one of each")
        for name in (*self.phases, *self.measure):
            if not NAME.fullmatch(name) or name in (BEFORE, MEASURED):
                raise ValueError(
                    f"{name!r} is to be a folder: wanted letters, digits, _ and -, but not {BEFORE} or {MEASURED}"
                )
        for number, (name, phase) in enumerate(self.phases.items()):
            above = list(self.phases)[:number]
            if phase.after not in (above or [None]):
                wanted = f"one of those above it: {', '.join(above)}" if above else "none, as it is the first"
                raise ValueError(f"phase {name!r} comes after {phase.after!r}; wanted {wanted}")
        for name, data in self.measure.items():
            if data.learnt_in not in (None, *self.phases):
                raise ValueError(
                    f"{name!r} is learnt in {data.learnt_in!r}; wanted one of {', '.join(self.phases)}"
                )

    def chain(self, phase: str) -> list[str]:
        """The phases up to this one, the first one first."""
        before = self.phases[phase].after
        return [*(self.chain(before) if before else []), phase]


def continual(
    plan: str, output: str | None = None, max_steps: int | None = None, limit: int | None = None
) -> None:
    """Trains the phases of a plan and answers every data set before the first and after each.

    Prints a table (after which phase, asked of which finetune, how much of which data set is right) and what was
    forgotten, and writes both with a picture. Started again, it goes on where it stopped.

    Args:
        plan: YAML file such as configs/continual/facts.yaml or configs/continual/languages.yaml.
        output: folder in place of the plan's own.
        max_steps: of every phase, in place of the configs' own; for a quick look, with an --output of its own.
        limit: ask at most so many questions of every data set.
    """
    todo = read_plan(plan)
    todo.output = output or todo.output
    if max_steps is not None:
        for phase in todo.phases.values():
            phase.settings = merged(phase.settings, {"trainer": {"max_steps": max_steps}})
    if limit is not None:
        for data in todo.measure.values():
            data.limit = min(limit, data.limit or limit)
    write_results(todo, run(todo), title=Path(plan).stem)


def read_plan(path: str) -> Plan:
    """Raises:
    ValueError: the file is no plan; the message names the file and the key.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Plan)
    try:
        return Plan(**vars(parser.instantiate(parser.parse_path(path))))
    except (ArgumentError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is no plan: {error}; `python scripts/continual.py --help` shows one"
        ) from None


def run(plan: Plan) -> list[Row]:
    """Trains and measures what is not there yet, and returns the whole table."""
    settings = {name: fit_settings(plan, name) for name in plan.phases}
    finetunes = {name: finetunes_after(plan, name, settings) for name in plan.phases}
    first = next(iter(plan.phases))
    rows = [Row(BEFORE, next(iter(finetunes[first])), first, None)]
    measure(plan, rows[0], settings[first])
    for name in plan.phases:
        fit(settings[name])
        directory = serve_together(plan, name, finetunes[name])
        for finetune, phase in finetunes[name].items():
            rows.append(Row(name, finetune, phase, str(directory)))
            measure(plan, rows[-1], settings[phase])
    return rows


def fit_settings(plan: Plan, name: str) -> dict[str, Any]:
    """The settings that a phase is trained with."""
    phase = plan.phases[name]
    own: dict[str, Any] = {"trainer": {"default_root_dir": f"{plan.output}/{name}"}}
    if phase.after:
        own["model"] = {"start_from": f"{plan.output}/{phase.after}"}
    return merged(merged(yaml.safe_load(Path(phase.config).read_text()), phase.settings), own)


def merged(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Nested settings with changes put over them."""
    result = dict(settings)
    for key, new in changes.items():
        old = settings.get(key)
        result[key] = merged(old, new) if isinstance(old, dict) and isinstance(new, dict) else new
    return result


def finetunes_after(plan: Plan, name: str, settings: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Finetune -> the phase that trained it last, of those that are there after a phase.

    Raises:
        ValueError: a phase trains no finetune, or moves the projector that another finetune needs.
    """
    found: dict[str, str] = {}
    for phase in plan.chain(name):
        model = settings[phase]["model"]
        if not model.get("adapter"):
            raise ValueError(
                f"phase {phase!r} ({plan.phases[phase].config}) has no model.adapter; wanted a finetune. Train "
                "projectors before, and give their run to the first phase as model.start_from"
            )
        found[model.get("adapter_name", "default")] = phase
        moves = model.get("vision", {}) is not None and model.get("train_projector", True)
        if len(found) > 1 and moves:
            raise ValueError(
                f"phase {phase!r} trains the projector that {', '.join(found)} share, so the others would answer "
                "otherwise than before; set model.train_projector to false in its settings"
            )
    return found


def fit(settings: dict[str, Any]) -> None:
    """Trains a phase, unless that was done.

    Raises:
        ValueError: it was done with other settings, or from another run.
    """
    directory = Path(settings["trainer"]["default_root_dir"])
    start = settings["model"].get("start_from")
    stamp = {"settings": settings, "start": weights_of(start) if start else None}
    if not (directory / MANIFEST).exists():
        write_json(stamp_path(directory), stamp)
        return main(["fit", "--config", write_config(settings)])
    if lines := differences(read_json(stamp_path(directory)), json.loads(json.dumps(stamp))):
        raise ValueError(
            f"{directory} was trained otherwise than is wanted now:\n" + "\n".join(lines) + "\n"
            "Delete it to train it again, or name another --output"
        )
    print(f"{directory}: trained already")


def serve_together(plan: Plan, name: str, finetunes: dict[str, str]) -> Path:
    """The run directory that holds all finetunes there are after a phase."""
    latest = Path(plan.output) / name
    if len(finetunes) == 1:
        return latest
    together = latest / TOGETHER
    shutil.rmtree(together, ignore_errors=True)  # copies of small files
    together.mkdir()
    shutil.copy(latest / PROJECTOR, together)
    for finetune, phase in finetunes.items():
        shutil.copytree(f"{plan.output}/{phase}/adapters/{finetune}", together / "adapters" / finetune)
    manifest = read_manifest(latest)
    manifest.adapters = list(finetunes)
    write_manifest(together, manifest)
    return together


def measure(plan: Plan, row: Row, settings: dict[str, Any]) -> None:
    """Fills a row of the table by `mmpeft test`, where that was not done.

    Before the first phase its finetune is asked as it begins, which for most methods is the base to the bit.
    """
    start = row.run or settings["model"].get("start_from")
    for name, data in plan.measure.items():
        directory = Path(plan.output, MEASURED, row.phase, row.finetune, name)
        stamp = {
            "model": hash_json(settings["model"] if row.run is None else row.finetune),
            "start": weights_of(start) if start else None,
            "data": [data.test, content(resolve(data.test)), data.limit],
        }
        if read_json(stamp_path(directory)) != stamp:
            print(f"{row.phase}, {row.finetune}: {name}")
            own = {
                "trainer": {"default_root_dir": str(directory)},
                "data": {"test": data.test, "limit": data.limit},
                "model": {"start_from": start},
            }
            main(["test", "--config", write_config(merged(settings, own))])
            write_json(stamp_path(directory), stamp)  # last: a killed measurement has none
        row.exact_match[name] = read_json(directory / "metrics.json")[METRIC]
        lines = (directory / "predictions.jsonl").read_text().splitlines()
        row.answers[name] = [json.loads(line)["answer"] for line in lines]


def weights_of(run: str) -> str:
    """Identity of what a run trained; not of its metrics and facts, which a later test changes.

    Raises:
        ValueError: it is no run.
    """
    manifest = read_manifest(run)
    files = [path for name in manifest.adapters for path in sorted(Path(run, "adapters", name).rglob("*.*"))]
    return hash_json([manifest.identity, manifest.projector, manifest.adapters, *map(content, files)])


def content(path: str | Path) -> str | None:
    """Identity of a file; a folder has none."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:32] if Path(path).is_file() else None


def forgetting(plan: Plan, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Of every data set with `DataSet.learnt_in`, what became of it in each phase after, asked of the finetune that
    learnt it: accuracy then less accuracy now, and how many answers changed."""
    found = []
    for data, own in plan.measure.items():
        for then in (row for row in rows if own.learnt_in == row.phase == row.trained_in):
            later = (row for row in rows if row.finetune == then.finetune and row.phase in plan.phases)
            for now in (row for row in later if then.phase in plan.chain(row.phase)[:-1]):
                values = then.exact_match[data], now.exact_match[data]
                pairs = list(zip(then.answers[data], now.answers[data], strict=True))
                found.append(
                    {"data": data, "learnt_in": then.phase, "after": now.phase, "finetune": then.finetune}
                    | {"was": values[0], "is": values[1], "forgotten": values[0] - values[1]}
                    | {"other_answers": sum(a != b for a, b in pairs), "questions": len(pairs)}
                )
    return found


def write_results(plan: Plan, rows: Sequence[Row], title: str) -> None:
    """Prints the tables and writes table.md, results.json and matrix.png."""
    output, names, lost = Path(plan.output), list(plan.measure), forgetting(plan, rows)
    content = {"metric": METRIC, "rows": [asdict(row) for row in rows], "forgetting": lost}
    for row in content["rows"]:
        row["questions"] = {name: len(answers) for name, answers in row.pop("answers").items()}
    write_json(output / "results.json", content)
    parts = [f"# {title}: {METRIC}", matrix(names, rows), *what_became(lost), *how_to_ask(rows)]
    text = "\n\n".join(parts)
    (output / "table.md").write_text(text + "\n")
    draw_matrix(output / "matrix.png", names, rows, title)
    print(f"\n{text}\n\nwritten to {output}: table.md, results.json, matrix.png")


def read_json(path: Path) -> Any:
    """The content of a JSON file; {} where there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


def stamp_path(directory: Path) -> Path:
    """File beside a run or a measurement that says what it was made from: a changed plan never passes for the old."""
    return directory.with_name(f"{directory.name}.json")


def write_config(settings: dict[str, Any]) -> str:
    """Writes settings for `mmpeft --config` beside the directory that they are of."""
    path = Path(f"{settings['trainer']['default_root_dir']}.yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    return str(path)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file, and the folder for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_function_arguments(continual, as_positional=True, as_group=False)
    try:
        continual(**vars(parser.parse_args()))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")

"""Continual learning: finetunes in phases, and what each left of the ones before (`mmpeft continual PLAN`).

A phase goes on training the finetune of the phase it comes after if it has the same model.adapter_name; under another
name it begins one of its own, and OUTPUT/PHASE/together holds both, so that every row of a batch may ask either. With
the projector frozen (model.train_projector: false) the older one then answers to the bit as before.

    OUTPUT/PHASE/                         the run directory of a phase, OUTPUT/PHASE.yaml its config
    OUTPUT/measured/PHASE/FINETUNE/DATA/  predictions.jsonl and metrics.json of one cell of the table
    OUTPUT/table.md matrix.png results.json
"""

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmpeft.experiments.continual_plan import (
    BEFORE,
    MEASURED,
    Plan,
    finetunes_after,
    fit_settings,
    read_plan,
)
from mmpeft.experiments.continual_table import Row, draw_matrix, how_to_ask, matrix, what_became
from mmpeft.experiments.steps import (
    Settings,
    content,
    evaluate_once,
    fit_once,
    merged,
    read_answers,
    read_metrics,
    weights_of,
)
from mmpeft.files import write_json
from mmpeft.hashing import hash_json
from mmpeft.paths import resolve
from mmpeft.runs.files import load_run, load_trained, save_run

TOGETHER = "together"
METRIC = "exact_match"


def continual(
    plan: str, output: str | None = None, max_steps: int | None = None, limit: int | None = None
) -> None:
    """Trains the phases of a plan and answers every data set before the first and after each.

    Prints the tables and writes them with a picture; `experiments.commands.continual` explains the arguments.

    Raises:
        RefusedError: a file that is no plan, or a phase that was trained otherwise.
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


def run(plan: Plan) -> list[Row]:
    """Trains and measures what is not there yet, and returns the whole table."""
    settings = {name: fit_settings(plan, name) for name in plan.phases}
    finetunes = {name: finetunes_after(plan, name, settings) for name in plan.phases}
    first = next(iter(plan.phases))
    rows = [Row(BEFORE, next(iter(finetunes[first])), first, None)]
    measure(plan, rows[0], settings[first])
    for name in plan.phases:
        fit_once(settings[name], {"start": weights_of(settings[name]["model"].get("start_from"))})
        directory = serve_together(plan, name, finetunes[name])
        for finetune, phase in finetunes[name].items():
            rows.append(Row(name, finetune, phase, str(directory)))
            measure(plan, rows[-1], settings[phase])
    return rows


def serve_together(plan: Plan, name: str, finetunes: dict[str, str]) -> Path:
    """The run directory that holds all finetunes there are after a phase."""
    latest = Path(plan.output) / name
    if len(finetunes) == 1:
        return latest
    together = latest / TOGETHER
    shutil.rmtree(together, ignore_errors=True)  # copies of small files
    model, _, manifest = load_run(latest, with_adapters=False)
    for finetune, phase in finetunes.items():
        load_trained(Path(plan.output, phase), model, {finetune: finetune})
    save_run(together, manifest, model)
    return together


def measure(plan: Plan, row: Row, settings: Settings) -> None:
    """Fills a row of the table by `mmpeft test`, where that was not done.

    Before the first phase its finetune is asked as it begins, which for most methods is the base to the bit.
    """
    start = row.run or settings["model"].get("start_from")
    for name, data in plan.measure.items():
        directory = Path(plan.output, MEASURED, row.phase, row.finetune, name)
        made_from = {
            "model": hash_json(settings["model"] if row.run is None else row.finetune),
            "start": weights_of(start),
            "data": [data.test, content(resolve(data.test)), data.limit],
        }
        own = {
            "trainer": {"default_root_dir": str(directory)},
            "data": {"test": data.test, "limit": data.limit},
            "model": {"start_from": start},
        }
        evaluate_once(merged(settings, own), made_from, title=f"{row.phase}, {row.finetune}: {name}")
        row.exact_match[name] = read_metrics(directory)[METRIC]
        row.answers[name] = read_answers(directory)


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
    results = {"metric": METRIC, "rows": [asdict(row) for row in rows], "forgetting": lost}
    for row in results["rows"]:
        row["questions"] = {name: len(answers) for name, answers in row.pop("answers").items()}
    write_json(output / "results.json", results)
    parts = [f"# {title}: {METRIC}", matrix(names, rows), *what_became(lost), *how_to_ask(rows)]
    text = "\n\n".join(parts)
    (output / "table.md").write_text(text + "\n")
    draw_matrix(output / "matrix.png", names, rows, title)
    print(f"\n{text}\n\nwritten to {output}: table.md, results.json, matrix.png")

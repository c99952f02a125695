"""What an evaluation leaves in the run directory: predictions, metrics, pictures, and a table on the screen."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmpeft.adapters.weight_change import weight_changes
from mmpeft.data.records import IMAGE_MARKER, Record
from mmpeft.evaluation.evaluate import Evaluation, as_answer
from mmpeft.evaluation.examples import write_examples
from mmpeft.evaluation.forgetting import Forgetting, measure_forgetting, measure_image_forgetting
from mmpeft.evaluation.results_table import print_metrics
from mmpeft.files import write_json, write_whole
from mmpeft.inference.engine import Engine
from mmpeft.inference.requests import Completion
from mmpeft.metrics.answer import Answer
from mmpeft.metrics.calibration import reliability
from mmpeft.metrics.classification import confusion
from mmpeft.metrics.intervals import as_metrics, by_images, intervals
from mmpeft.metrics.registry import evaluate, fitting_metrics
from mmpeft.reporting.figures import MAX_CLASSES, draw_confusion, draw_reliability
from mmpeft.reporting.heat_map import draw_changes
from mmpeft.reporting.run_report import remove_pictures, write_report
from mmpeft.runs.identity import base_hash
from mmpeft.runs.manifest import MANIFEST, read_manifest, write_manifest

Metrics = dict[str, dict[str, float]]
"""Finetune -> metric -> value."""


def write_predictions(path: Path, evaluation: Evaluation) -> int:
    """A row per question, in the order of the data. Returns how many there are."""
    joint = len(set(evaluation.owners)) > 1
    rows = [
        _row(record, owner, completion, joint) | {"images": evaluation.image_keys(record)}
        for record, owner, completion in evaluation.answered()
    ]
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return len(rows)


def write_results(
    run: Path,
    folder: Path,
    evaluation: Evaluation,
    metrics: Sequence[str] | None,
    tokenizer: Any,
    held_texts: Sequence[str] = (),
    held_records: Sequence[Record] = (),
) -> None:
    """Measures the answers and writes predictions, metrics, pictures and a fresh report.

    Args:
        run: directory of the run.
        folder: for the results; the report is the run's own where this is its directory.
        evaluation: all of whose questions were answered.
        metrics: by name; None takes those that fit.
        tokenizer: of the model.
        held_texts: plain text on which base and finetune are compared; none measures no forgetting.
        held_records: questions about images on which they are compared too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_predictions(folder / "predictions.jsonl", evaluation)
    remove_pictures(folder)
    answered = _by_finetune(evaluation)
    measured: Metrics = {}
    for name, pairs in answered.items():
        answers = [as_answer(record, own) for record, own in pairs if own.error is None]
        clusters = by_images([evaluation.image_keys(record) for record, own in pairs if own.error is None])
        values = evaluate(answers, metrics) if answers else {}
        found = dict(as_metrics(intervals(answers, clusters, values)) if answers else ())
        measured[name] = values | _counts(pairs) | found
        _draw(folder, answers, _suffix(name, answered), name)
    told: dict[str, str] = {}
    if held_texts:
        asked = {name: own for name, own in measured.items() if name not in evaluation.left_out}
        held = tokenizer, held_texts, held_records
        told = _forgotten(run, folder, evaluation.engine, held, asked)
    flat = _flat(measured)
    write_json(folder / "metrics.json", flat)
    if folder == run and (run / MANIFEST).exists():
        manifest = read_manifest(run)
        manifest.metrics = flat
        manifest.facts |= told
        write_manifest(run, manifest)
        write_examples(run, evaluation.records, evaluation.texts(), manifest.image_config)
        write_report(run)
    print_metrics(measured)
    print(f"results are in {folder}")


def _row(record: Record, owner: str, completion: Completion, joint: bool) -> dict[str, Any]:
    question, truth = record["turns"][-1]
    row: dict[str, Any] = {
        "id": record["id"],
        "question": question.replace(IMAGE_MARKER, ""),
        "answer": completion.text,
    }
    if joint:
        row["adapter"] = owner
    if completion.scores is not None:
        row["scores"] = dict(zip(record.get("choices", ()), completion.scores, strict=True))
    if completion.finish_reason == "length":
        row["cut"] = True
    if completion.error is not None:
        row |= {"answer": None, "error": completion.error}
    several = record.get("references") or []
    return row | {"truth": truth} | ({"references": several} if several not in ([], [truth]) else {})


def _by_finetune(evaluation: Evaluation) -> dict[str, list[tuple[Record, Completion]]]:
    found: dict[str, list[tuple[Record, Completion]]] = {}
    for record, owner, completion in evaluation.answered():
        found.setdefault(owner, []).append((record, completion))
    return found


def _counts(pairs: Sequence[tuple[Record, Completion]]) -> dict[str, float]:
    """How many were asked, could not be asked, and were cut before their end."""
    counts: dict[str, float] = {"questions": len(pairs)}
    if errors := sum(own.error is not None for _, own in pairs):
        counts["errors"] = errors
    if any(own.finish_reason in ("stop", "length") for _, own in pairs):
        counts["cut_answers"] = sum(own.finish_reason == "length" for _, own in pairs)
    return counts


def _suffix(name: str, names: Mapping[str, Any]) -> str:
    return f"_{name}" if len(names) > 1 else ""


def _draw(directory: Path, answers: list[Answer], suffix: str, name: str) -> None:
    """What was taken for what, where the answers are classes; and what their confidence is worth."""
    if not answers:
        return
    fitting, title = fitting_metrics(answers), name if suffix else directory.name
    if "f1" in fitting and len((table := confusion(answers))[0]) <= MAX_CLASSES:
        draw_confusion(directory / f"confusion{suffix}.png", *table, title=title)
    if "calibration_error" in fitting:
        draw_reliability(directory / f"calibration{suffix}.png", reliability(answers), title=title)


def _forgotten(
    run: Path,
    folder: Path,
    engine: Engine,
    held: tuple[Any, Sequence[str], Sequence[Record]],
    measured: Metrics,
) -> dict[str, str]:
    """Adds to the metrics what each finetune changed in the base's own abilities, and draws where it moved.

    Args:
        held: the tokenizer, plain text, and questions about images, of which there may be none.

    Returns:
        The same in words.
    """
    told: dict[str, str] = {}
    (tokenizer, texts, records), model = held, engine.model
    for name, own in measured.items():
        adapter, suffix = name if name in model.bank else None, _suffix(name, measured)
        whose = f"forgetting {name if suffix else ''}".strip()
        found = measure_forgetting(model, tokenizer, texts, adapter)
        own |= _as_metrics(found, "forgetting")
        told[whose] = str(found)
        if records:
            of_images = measure_image_forgetting(engine, records, adapter)
            own |= _as_metrics(of_images, "forgetting_of_images")
            told[whose.replace("forgetting", "forgetting of images", 1)] = str(of_images)
        if adapter and (changes := weight_changes(model.bank, adapter)):
            draw_changes(folder / f"changes{suffix}.png", changes, title=adapter)
    if (run / MANIFEST).exists() and (trained := read_manifest(run).base):
        same = trained == base_hash(model)
        told["base weights"] = (
            "unchanged by the training, to the bit" if same else "NOT those after the training"
        )
        print(f"base weights: {told['base weights']}")
    return told


def _as_metrics(found: Forgetting, name: str) -> dict[str, float]:
    return {
        f"{name}/perplexity_base": found.base_perplexity,
        f"{name}/perplexity": found.perplexity,
        f"{name}/same_token": found.agreement,
        f"{name}/kl": found.divergence,
    }


def _flat(measured: Metrics) -> dict[str, float]:
    """``metric`` or, of several finetunes, ``metric/finetune``."""
    joint = len(measured) > 1
    return {
        f"{metric}/{name}" if joint else metric: value
        for name, own in measured.items()
        for metric, value in own.items()
    }

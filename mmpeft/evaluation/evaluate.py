"""The callback that turns the answers of `mmpeft test` and `predict` into files, a table and pictures."""

import json
from pathlib import Path
from typing import Any

import lightning as L
from rich.console import Console
from rich.table import Table

from mmpeft.adapters.weight_change import weight_changes
from mmpeft.data.template import IMAGE_MARKER
from mmpeft.evaluation.answer_log import Answered
from mmpeft.evaluation.forgetting import measure_forgetting
from mmpeft.metrics.answer import Answer
from mmpeft.metrics.calibration import reliability
from mmpeft.metrics.classification import confusion
from mmpeft.metrics.registry import check_metrics, evaluate, fitting_metrics
from mmpeft.reporting.figures import MAX_CLASSES, draw_confusion, draw_reliability
from mmpeft.reporting.heat_map import draw_changes
from mmpeft.runs.identity import base_hash
from mmpeft.runs.manifest import MANIFEST, read_manifest, write_manifest
from mmpeft.training.datamodule import Split, VisionLanguageData
from mmpeft.training.module import VisionLanguageModule
from mmpeft.training.run_writer import remove_pictures, write_examples, write_report


class EvaluationResults(L.Callback):
    """Writes predictions.jsonl, metrics.json and pictures after test, answers.jsonl after predict.

    Args:
        forgetting: whether a test also compares base and finetune on held-out plain text.
    """

    def __init__(self, forgetting: bool = False):
        self.forgetting = forgetting

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What is wrong with the settings is better told before everything is answered."""
        _, data = _typed(pl_module, trainer)
        if data.metrics:
            check_metrics(data.metrics, [_answer(r, _unanswered(r, data)) for r in data.records["test"]])
        self._texts = data.held_texts() if self.forgetting else []

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module, data = _typed(pl_module, trainer)
        path = Path(trainer.default_root_dir) / "answers.jsonl"
        self._write(path, "predict", module, data)
        module.answer_log.discard()
        print(f"{len(data.records['predict'])} answers written to {path}")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module, data = _typed(pl_module, trainer)
        directory = Path(trainer.default_root_dir)
        self._write(directory / "predictions.jsonl", "test", module, data)
        remove_pictures(directory)
        answers = _answers(module, data)
        metrics = {name: evaluate(own, data.metrics) for name, own in answers.items()}
        told = _forgotten(directory, module, self._texts, metrics) if self.forgetting else {}
        (directory / "metrics.json").write_text(json.dumps(_flat(metrics, answers), indent=2) + "\n")
        for name, own in answers.items():
            _draw(directory, own, name)
        if (directory / MANIFEST).exists():
            manifest = read_manifest(directory)
            manifest.metrics = _flat(metrics, answers)
            manifest.facts |= told
            write_manifest(directory, manifest)
            write_examples(directory, data, "test", _texts(module))
            write_report(directory)
        _print(metrics, answers)
        module.answer_log.discard()

    def _write(
        self, path: Path, split: Split, module: VisionLanguageModule, data: VisionLanguageData
    ) -> None:
        """A row per example, in the order of the data."""
        owners = _owners(data, split)
        with path.open("w") as file:
            for number, answered in sorted(module.answer_log.answers.items()):
                record = data.records[split][number]
                question, truth = record["turns"][-1]
                row = {
                    "id": record["id"],
                    "question": question.replace(IMAGE_MARKER, ""),
                    "answer": answered.text,
                }
                if owner := owners.get(number):
                    row["adapter"] = owner
                if answered.scores is not None:
                    row["scores"] = dict(zip(record["choices"], answered.scores, strict=True))
                file.write(json.dumps(row | {"truth": truth}, ensure_ascii=False) + "\n")


def _typed(module: Any, trainer: Any) -> tuple[VisionLanguageModule, VisionLanguageData]:
    return module, trainer.datamodule


def _draw(directory: Path, answers: list[Answer], name: str) -> None:
    """What was taken for what, where the answers are classes; and what their confidence is worth."""
    fitting, suffix = fitting_metrics(answers), f"_{name}" if name else ""
    if "f1" in fitting and len((table := confusion(answers))[0]) <= MAX_CLASSES:
        draw_confusion(directory / f"confusion{suffix}.png", *table, title=name or directory.name)
    if "calibration_error" in fitting:
        draw_reliability(
            directory / f"calibration{suffix}.png", reliability(answers), title=name or directory.name
        )


def _forgotten(
    directory: Path,
    module: VisionLanguageModule,
    texts: list[str],
    metrics: dict[str, dict[str, float]],
) -> dict[str, str]:
    """Adds to the metrics what each finetune changed in the base's own abilities, and draws where it moved.

    Returns:
        The same in words.
    """
    told, bank = {}, module.model.bank
    for name, own in metrics.items():
        adapter = name or module.adapter_name
        found = measure_forgetting(
            module.model, module.tokenizer, texts, adapter if adapter in bank else None
        )
        own["forgetting/perplexity_base"], own["forgetting/perplexity"] = (
            found.base_perplexity,
            found.perplexity,
        )
        own["forgetting/same_token"], own["forgetting/kl"] = found.agreement, found.divergence
        told[f"forgetting {name}".strip()] = str(found)
        if adapter in bank and (changes := weight_changes(bank, adapter)):
            draw_changes(directory / f"changes{f'_{name}' if name else ''}.png", changes, title=adapter)
    if (directory / MANIFEST).exists() and (trained := read_manifest(directory).base):
        same = trained == base_hash(module.model)
        told["base weights"] = (
            "unchanged by the training, to the bit" if same else "NOT those after the training"
        )
        print(f"base weights: {told['base weights']}")
    return told


def _owners(data: VisionLanguageData, split: Split) -> dict[int, str]:
    """Of a joint run, number of the record -> finetune."""
    return {number: name for name, own in data.finetune_ranges(split).items() for number in own}


def _texts(module: VisionLanguageModule) -> dict[int, str]:
    return {number: answered.text for number, answered in module.answer_log.answers.items()}


def _answers(module: VisionLanguageModule, data: VisionLanguageData) -> dict[str, list[Answer]]:
    """Finetune -> its answers with the truth; under "" where the run has just one."""
    owners, found = _owners(data, "test"), {}
    for number, answered in sorted(module.answer_log.answers.items()):
        found.setdefault(owners.get(number, ""), []).append(_answer(data.records["test"][number], answered))
    return found


def _unanswered(record: Any, data: VisionLanguageData) -> Answered:
    """An answer that says nothing, with the parts that the answer to this record will have."""
    scores = [0.0] * len(record["choices"]) if data.is_ranked(record) else None
    likelihood = (0.0, 1) if data.wants_likelihoods or scores else (None, None)
    return Answered("", scores, *likelihood)


def _answer(record: Any, answered: Answered) -> Answer:
    return Answer(
        id=record["id"],
        where=record["where"],
        prediction=answered.text,
        references=record.get("references") or [record["turns"][-1][1]],
        choices=record.get("choices"),
        scores=answered.scores,
        log_likelihood=answered.log_likelihood,
        num_tokens=answered.num_tokens,
    )


def _flat(metrics: dict[str, dict[str, float]], answers: dict[str, list[Answer]]) -> dict[str, float]:
    """``metric`` or, in a joint run, ``metric/finetune``, and the number of questions."""
    flat: dict[str, float] = {}
    for name, own in metrics.items():
        for metric, value in {**own, "questions": len(answers[name])}.items():
            flat[f"{metric}/{name}" if name else metric] = value
    return flat


def _print(metrics: dict[str, dict[str, float]], answers: dict[str, list[Answer]]) -> None:
    """Metrics down, finetunes across."""
    counts = {name: len(own) for name, own in answers.items()}
    table = Table("metric", title=f"test: {max(counts.values()):,} questions")
    for name in metrics:
        table.add_column(name or "value", justify="right")
    for metric in dict.fromkeys(metric for own in metrics.values() for metric in own):
        table.add_row(metric, *(f"{own[metric]:.4f}" if metric in own else "" for own in metrics.values()))
    Console().print(table)

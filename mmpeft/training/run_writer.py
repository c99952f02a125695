"""The callback that turns a run into a directory that anybody can read, and prints what the run cost."""

import json
import resource
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.table import Table

from mmpeft.data.images import load_image
from mmpeft.data.sources import DataError
from mmpeft.data.template import IMAGE_MARKER
from mmpeft.reporting.card import model_card
from mmpeft.reporting.report import ShownExample, draw_report
from mmpeft.runs.files import save_run
from mmpeft.runs.identity import base_hash
from mmpeft.runs.manifest import Manifest, read_manifest
from mmpeft.training.answering import answer
from mmpeft.training.datamodule import Split, VisionLanguageData
from mmpeft.training.module import VisionLanguageModule

NUM_EXAMPLES = 12
PICTURES = ("confusion", "calibration", "changes")
"""What `mmpeft test` draws beside the report."""
SHOWN_METRICS, NUM_SCORES = ("exact_match", "vqa_accuracy", "perplexity", "cider"), 4
"""Metrics that the report names, and at most how many of them."""


class RunDirectory(L.Callback):
    """Writes the run directory after fit."""

    def __init__(self):
        self._started = time.monotonic()

    # -- fit ------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started = time.monotonic()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Answers some questions while the model is still on its device."""
        module, data = _typed(pl_module, trainer)
        if trainer.is_global_zero and not trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
            self._some_answers = _some_answers(module, data, _example_split(data))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module, data = _typed(pl_module, trainer)
        if not trainer.is_global_zero or trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
            return
        directory = Path(trainer.default_root_dir)
        own, earlier = data.instructions(), module.earlier_instructions
        manifest = Manifest(
            language=asdict(module.language),
            vision=asdict(module.vision) if module.vision else None,
            template={"style": data.style, "max_length": data.packing.max_length},
            identity=module.identity,
            base=base_hash(module.model),
            instructions=own | {task: text for task, text in earlier.items() if task not in own},
            facts=cost(module, time.monotonic() - self._started),
        )
        save_run(directory, manifest, module.model)
        remove_pictures(directory)
        write_examples(directory, data, _example_split(data), self._some_answers)
        write_report(directory)
        _print_facts(manifest.facts, directory)


def cost(module: VisionLanguageModule, seconds: float) -> dict[str, str]:
    """What people ask of a finetune: how much of the base was trained, how large it is, what it took."""
    adapter = sum(view.numel() for finetune in module.finetunes for view in finetune.adapter)
    trained = adapter + sum(view.numel() for finetune in module.finetunes for view in finetune.projector)
    base = module.model.language_model
    stacks = sum(p.numel() for p in module.model.bank.parameters())
    frozen = base.num_parameters() - stacks  # counts a 4-bit weight's numbers, not its bytes
    base_bytes = sum(p.numel() * p.element_size() for p in base.parameters()) - 4 * stacks
    share = f"{adapter:,} = {100 * adapter / frozen:.3f} % of the language model's {frozen / 1e6:.1f} M"
    return {
        "trained": f"{trained:,} parameters",
        **({"adapter": share} if adapter else {}),
        "files": f"{4 * trained / 1e6:.2f} MB beside the base's {base_bytes / 1e6:.0f} MB",
        "peak memory": f"{peak_memory_bytes() / 1e9:.2f} GB",
        "time": f"{seconds / 60:.1f} min",
    }


def peak_memory_bytes() -> int:
    """Highest resident memory of this process; of the GPU where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _typed(module: Any, trainer: Any) -> tuple[VisionLanguageModule, VisionLanguageData]:
    return module, trainer.datamodule


def _example_split(data: VisionLanguageData) -> Split:
    return "val" if data.records.get("val") else "train"


def _some_answers(module: VisionLanguageModule, data: VisionLanguageData, split: Split) -> dict[int, str]:
    """Answers to the first batches of a split, enough for the examples."""
    assert data.template is not None
    answers: dict[int, str] = {}
    module.model.eval()
    try:
        loaders = data.question_loaders(split)
    except DataError as error:  # a question that trains may be too long with all its choices
        print(f"no examples are shown: {error}")
        return answers
    for loader in loaders:
        for batch in loader:
            answered = answer(module.model, data.template, batch.to(module.model.device), data.records[split])
            answers |= {number: one.text for number, one in answered}
            if len(answers) >= 8 * NUM_EXAMPLES:
                return answers
    return answers


def write_examples(directory: Path, data: VisionLanguageData, split: Split, answers: dict[int, str]) -> None:
    """Examples spread over the answered ones, with their images, so that the directory can be moved."""
    folder = directory / "examples"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    numbers = sorted(answers)
    numbers = numbers[:: max(1, len(numbers) // NUM_EXAMPLES)][:NUM_EXAMPLES]
    with (folder / "examples.jsonl").open("w") as file:
        for place, number in enumerate(numbers):
            record = data.records[split][number]
            question, truth = record["turns"][-1]
            name = f"{place:02d}.png" if record["images"] else None
            if name:
                load_image(record["images"][0]).save(folder / name)
            row = {
                "image": name,
                "question": question.replace(IMAGE_MARKER, "").strip(),
                "task": record["task"],
            }
            file.write(json.dumps(row | {"truth": truth, "answer": answers[number]}) + "\n")


def remove_pictures(directory: Path) -> None:
    """Those that an earlier test drew: they are not of these weights or answers."""
    for stem in PICTURES:
        for old in directory.glob(f"{stem}*.png"):
            old.unlink()


def write_report(directory: Path) -> None:
    """Draws the report anew from what the directory holds, and writes its model card."""
    manifest = read_manifest(directory)
    rows = [json.loads(line) for line in (directory / "examples" / "examples.jsonl").read_text().splitlines()]
    examples = [
        ShownExample(
            row["image"] and str(directory / "examples" / row["image"]),
            row["question"],
            row["truth"],
            row["answer"],
        )
        for row in rows
    ]
    facts = dict(manifest.facts)
    if manifest.metrics:
        facts = {**_scores(manifest.metrics), **facts}
    curves = directory / "metrics.csv"
    draw_report(
        directory / "report.png", curves if curves.exists() else None, examples, directory.name, facts
    )
    card = model_card(
        asdict(manifest),
        title=directory.name,
        metrics=manifest.metrics,
        facts=facts,
        examples=examples,
        command="mmpeft fit --config config.yaml",
        pictures=[path.name for stem in PICTURES for path in sorted(directory.glob(f"{stem}*.png"))],
    )
    (directory / "README.md").write_text(card)


def _scores(metrics: dict[str, float]) -> dict[str, str]:
    """The first metrics of a test, in words: exact match, and accuracy where classes were told apart."""
    shown = [name for name in metrics if name.split("/")[0] in SHOWN_METRICS][:NUM_SCORES]
    counts = {name: metrics[name.replace(name.split("/")[0], "questions", 1)] for name in shown}
    return {
        name.replace("_", " "): f"{metrics[name]:.4f} on {int(counts[name]):,} questions" for name in shown
    }


def _print_facts(facts: dict[str, str], directory: Path) -> None:
    table = Table(title=f"run {directory}", show_header=False)
    for name, value in facts.items():
        table.add_row(name, value)
    Console().print(table)

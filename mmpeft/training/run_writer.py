"""The callback that writes the run directory of a fit, and prints what the run cost."""

import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from rich.console import Console
from rich.table import Table

from mmpeft.data.choices import KnownChoices, known_choices
from mmpeft.data.records import CAPTION_TASK, Record
from mmpeft.data.store import first_of_image_sets
from mmpeft.errors import RefusedError
from mmpeft.evaluation.examples import QUESTIONS_FOR_EXAMPLES, some_answers, write_examples
from mmpeft.files import write_whole
from mmpeft.inference.decoding import Sampling
from mmpeft.inference.requests import Request
from mmpeft.options import command_line
from mmpeft.reporting.run_report import remove_pictures, write_report
from mmpeft.runs.files import BASE, save_run
from mmpeft.runs.identity import base_hash
from mmpeft.runs.layout import CARD, CONFIG
from mmpeft.runs.manifest import MANIFEST, Manifest, no_run, places_of
from mmpeft.runs.occupancy import put_aside
from mmpeft.training.batches import longest_answer
from mmpeft.training.curves import BoardLogger, CurvesLogger, coming_row
from mmpeft.training.datamodule import VisionLanguageData, all_records, instructions
from mmpeft.training.finetune import Split
from mmpeft.training.module import VisionLanguageModule
from mmpeft.training.sharding import INSTEAD, sharded

HAS_ENDED = "has ended already; raise trainer.max_steps or max_epochs to train it further"
ROW = "row_of_curves"
"""Key of a checkpoint: `coming_row`."""


def writes(trainer: Any) -> bool:
    """Whether this process writes what the run leaves: the first one, of a run that is no trial."""
    return trainer.is_global_zero and not trainer.fast_dev_run


def typed(module: Any, trainer: Any) -> tuple[VisionLanguageModule, VisionLanguageData]:
    """Both as what they are, which Lightning's hooks do not say."""
    return module, trainer.datamodule


class RunWriter(L.Callback):
    """Writes the run directory: its config once training begins, all else when it has ended.

    Args:
        config: the settings of the run, as YAML.
    """

    def __init__(self, config: str):
        self.config = config
        self._started = time.monotonic()
        self._before = 0.0  # seconds that the run took until the checkpoint that it goes on from
        self._row: dict[str, float] | None = None
        self._base: str | None = None

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self._before + time.monotonic() - self._started}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self._before = state_dict["seconds"]

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: Any) -> None:
        checkpoint[ROW] = coming_row(trainer)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: Any) -> None:
        self._row = checkpoint.get(ROW)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Before a model is loaded."""
        if stage == "fit" and writes(trainer):
            refuse_no_training(trainer)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started = time.monotonic()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Nothing can refuse the fit any more: from here on the directory is its own."""
        if not writes(trainer):
            return
        directory = Path(trainer.default_root_dir)
        source = Path(trainer.ckpt_path).resolve() if trainer.ckpt_path else Path()
        if directory.resolve() not in source.parents:
            self._follow(put_aside(directory), directory)
        (directory / MANIFEST).unlink(missing_ok=True)  # until it has ended again
        for logger in trainer.loggers:
            if isinstance(logger, CurvesLogger | BoardLogger):
                logger.begin(trainer.global_step, self._row)
        write_whole(directory / CONFIG, self.config)

    def _follow(self, aside: Path | None, directory: Path) -> None:
        """What the run begins from may have lain in its own directory: to be resumed, it must be found again."""
        settings = yaml.safe_load(self.config)
        start_from = settings["model"].get("start_from")
        if aside is not None and start_from and Path(start_from).resolve() == directory.resolve():
            settings["model"]["start_from"] = str(aside)
            self.config = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Answers some questions while the model is still on its device."""
        module, data = typed(pl_module, trainer)
        if writes(trainer):
            self.manifest = self._describe(module, data)
            self._requests = _example_requests(module, self.manifest.max_new_tokens)
            module.model.eval()
            self._answers = some_answers(module.engine, self._requests)
        if processes := sharded(trainer):
            processes.barrier()  # while the first one answers, the others read with it
            self._base = base_hash(module.model)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module, data = typed(pl_module, trainer)
        if not writes(trainer):
            return
        directory = Path(trainer.default_root_dir)
        if not hasattr(self, "manifest"):  # resumed after the last step, Lightning trains nothing
            if (written := (directory / MANIFEST).exists()) and (directory / CARD).exists():
                return print(f"{directory} {HAS_ENDED}")
            if sharded(trainer):
                raise RefusedError(
                    f"{directory} has nothing left to train, and with a sharded base its examples cannot be answered "
                    f"now that the processes have parted: {INSTEAD}"
                )
            self.on_train_end(trainer, pl_module)
            if written:  # stopped between its finetunes and its card
                self._report(directory)
                return print(f"{directory} {HAS_ENDED}")
        manifest = self.manifest
        manifest.base = self._base or base_hash(module.model)
        manifest.facts = cost(module, self._before + time.monotonic() - self._started)
        if (notes := data.notes["train"]).skipped:
            manifest.facts["skipped"] = f"of the training data {notes.skipped_by_reason}"
        save_run(directory, manifest, module.model)
        remove_pictures(directory)
        self._report(directory)
        table = Table(title=f"run {directory}", show_header=False)
        for name, value in manifest.facts.items():
            table.add_row(name, value)
        Console().print(table)
        print(f"next: {next_command(module, data, manifest, directory)}")

    def _report(self, directory: Path) -> None:
        records = [request.record for request in self._requests]
        write_examples(directory, records, self._answers, self.manifest.image_config)
        write_report(directory)

    def _describe(self, module: VisionLanguageModule, data: VisionLanguageData) -> Manifest:
        earlier = module.started.manifest
        own = instructions(all_records(module.finetunes.values(), "train"))
        told = earlier.instructions if earlier else {}
        return Manifest(
            language=asdict(module.language),
            vision=asdict(module.vision) if module.vision else None,
            places=places_of(module.language, module.vision),
            template=module.engine.template.settings,
            identity=module.started.identity,
            self_check=module.started.self_check,
            instructions=own | {task: text for task, text in told.items() if task not in own},
            answer_tokens=longest_answer(module.batches.train()),
            choices=_listed_choices(module),
            without_images=[
                owner
                for owner, records in _trained_on(module).items()
                if not all(record["images"] for record in first_of_image_sets(records))
            ],
        )


def next_command(
    module: VisionLanguageModule, data: VisionLanguageData, manifest: Manifest, directory: Path
) -> str:
    """What can be done with a run as it is: a test only where there is data for all of its finetunes."""
    if all(own.paths.get("test", data.paths["test"]) for own in module.finetunes.values()):
        return command_line("test", "--run", directory)
    if manifest.vision is None:
        return command_line("ask", "--run", directory, "QUESTION")
    if CAPTION_TASK in manifest.instructions:
        return command_line("caption", "FOLDER", "--run", directory)
    return command_line("ask", "--run", directory, "--image", "IMAGE", "QUESTION")


def refuse_no_training(trainer: L.Trainer) -> None:
    """Lightning ends such a fit at once, and it would be written as one that trained. With ``max_epochs`` 0 and steps
    the start of a new run is what is wanted.

    Raises:
        RefusedError: there is nothing to train, or a fit that has not ended would be taken for one that has.
    """
    directory, start = Path(trainer.default_root_dir), trainer.max_epochs == 0 and trainer.max_steps > 0
    for name in ("max_steps", "limit_train_batches", "max_epochs"):
        if getattr(trainer, name) == 0 and not (start and name == "max_epochs"):
            raise RefusedError(f"trainer.{name} is 0: nothing would train; set it to at least 1")
    if start and (directory / CONFIG).exists() and not (directory / MANIFEST).exists():
        raise RefusedError(
            f"trainer.max_epochs is 0, and {no_run(directory)}; or name another trainer.default_root_dir"
        )


def cost(module: VisionLanguageModule, seconds: float) -> dict[str, str]:
    """What people ask of a finetune: how much of the base was trained, how large it is, what it took."""
    own = [finetune.parameters for finetune in module.finetunes.values() if finetune.parameters]
    adapter = sum(view.numel() for parameters in own for view in parameters.adapter)
    trained = adapter + sum(view.numel() for parameters in own for view in parameters.projector)
    base = module.model.language_model
    frozen = base.num_parameters()  # counts a 4-bit weight's numbers, not its bytes
    base_bytes = sum(p.numel() * p.element_size() for p in base.parameters())
    share = f"{adapter:,} = {100 * adapter / frozen:.3f} % of the language model's {frozen / 1e6:.1f} M parameters"
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


def _trained_on(module: VisionLanguageModule) -> dict[str, Sequence[Record]]:
    """Finetune, or "base" where the projector alone trained -> its training data."""
    adapters = module.adapters()
    return {adapters[name] or BASE: own.records["train"] for name, own in module.finetunes.items()}


def _listed_choices(module: VisionLanguageModule) -> dict[str, KnownChoices]:
    """Of every finetune that saw some and learnt to choose; of tasks that an earlier run alone trained it on, what was
    known then."""
    adapters = module.adapters()
    writers = {
        adapters[n] or BASE for n, own in module.finetunes.items() if own.settings.objective != "likelihood"
    }
    earlier = module.started.manifest.choices if module.started.manifest else {}
    found: dict[str, KnownChoices] = {}
    for owner, records in _trained_on(module).items():
        before = earlier.get(owner, earlier.get(module.start_adapter or "", {}))
        tasks = {record["task"] or "" for record in records}
        own = {task: known for task, known in before.items() if task not in tasks}
        own |= {} if owner in writers else known_choices(records)
        found |= {owner: own} if own else {}
    return found


def _example_requests(module: VisionLanguageModule, max_new_tokens: int) -> list[Request]:
    """Some of the held-out questions of the run, or of those it was trained on where it held none out."""
    split: Split = "val" if all_records(module.finetunes.values(), "val") else "train"
    config, sampling, adapters = module.evaluation_config, Sampling(max_new_tokens), module.adapters()
    every = max(1, len(all_records(module.finetunes.values(), split)) // QUESTIONS_FOR_EXAMPLES)
    return [
        Request(record, adapters[name], config.answer_by != "generate" and "choices" in record, sampling)
        for name, finetune in module.finetunes.items()
        for record in finetune.records.get(split, [])[::every]
        if record.get("desirable", True)  # a wrong answer is no truth to be shown
    ]

"""What a person sees while a model trains: the progress bar, lines in a log file, and the loss at the end."""

import math
import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar

from mmpeft.progress_bar import SECONDS_BETWEEN_LINES


def progress() -> L.Callback:
    """The bar in a terminal; lines where the output goes to a file."""
    return Progress() if in_a_terminal() else LogLines()


def in_a_terminal() -> bool:
    return sys.stdout.isatty()


class Progress(RichProgressBar):
    """Lightning's bar for steps that take seconds: it moves with every batch, counts epochs from one and steps against
    ``trainer.max_steps`` where that is what ends the run, and is as long as what will be run."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=1)

    @property
    def total_train_batches(self) -> int | float:
        """Of this epoch, which ``trainer.max_steps`` may end early; Lightning forgets that a step may take several."""
        trainer = self.trainer
        total, ready = trainer.num_training_batches, trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if trainer.max_steps <= 0:
            return total
        done = ready if ready < total else 0  # as an epoch begins, it still is the last one's
        return min(total, done + (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches)

    def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)  # the loggers' version, which for us is a folder's name
        if trainer.state.fn == "fit" and trainer.max_steps > 0:
            metrics = {"step": f"{trainer.global_step}/{trainer.max_steps}"} | metrics
        return metrics

    def _get_train_description(self, current_epoch: int) -> str:
        epochs = self.trainer.max_epochs or -1  # -1 where max_steps alone ends the run
        description = f"Epoch {current_epoch + 1}" + (f"/{epochs}" if epochs > 0 else "")
        return description.ljust(len(self.validation_description))  # bars of one length do not flicker


class LogLines(L.Callback):
    """A line every ten seconds, for output that is no terminal: step, seconds a step, and the curves."""

    def __init__(self) -> None:
        self._last = self._begun = time.monotonic()
        self._first_step = 0
        self._told_step = -1
        self._epoch = 1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._last = self._begun = time.monotonic()
        self._first_step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._epoch = trainer.current_epoch + 1  # after the last batch it is counted on
        if time.monotonic() - self._last >= SECONDS_BETWEEN_LINES:
            self._tell_step(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._told_step != trainer.global_step:
            self._tell_step(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._tell("validation", trainer)

    def on_test_batch_end(self, trainer: L.Trainer, *arguments: Any) -> None:
        self._tell_batch(trainer, arguments[3], trainer.num_test_batches)

    def on_predict_batch_end(self, trainer: L.Trainer, *arguments: Any) -> None:
        self._tell_batch(trainer, arguments[3], trainer.num_predict_batches)

    def _tell_step(self, trainer: L.Trainer) -> None:
        self._told_step = trainer.global_step
        self._last, steps = time.monotonic(), max(1, trainer.global_step - self._first_step)
        pace = f"{(self._last - self._begun) / steps:.2f} s a step"
        self._tell(f"step {trainer.global_step}{_of(trainer, self._epoch)}, {pace}", trainer)

    def _tell_batch(self, trainer: L.Trainer, number: int, totals: Any) -> None:
        total = sum(totals)
        if time.monotonic() - self._last >= SECONDS_BETWEEN_LINES or number + 1 == total:
            self._last = time.monotonic()
            print(f"batch {number + 1} of {total}", flush=True)

    def _tell(self, what: str, trainer: L.Trainer) -> None:
        curves = {name: float(value) for name, value in trainer.progress_bar_metrics.items()}
        print(what + "".join(f", {name} {value:.4g}" for name, value in curves.items()), flush=True)


class LastValidation(L.Callback):
    """A fit that ends between two validations ends with one: Lightning validates at ends of epochs alone."""

    def __init__(self) -> None:
        self._validated = -1

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._validated = trainer.global_step

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        loop: Any = trainer.fit_loop.epoch_loop
        if self._validated == trainer.global_step or not trainer.enable_validation or not trainer.global_step:
            return
        loop._batches_that_stepped -= 1  # the curves have it at the step that was just taken
        trainer.validating = True
        loop.val_loop.run()
        trainer.training = True
        loop._batches_that_stepped += 1


def _of(trainer: L.Trainer, epoch: int) -> str:
    total = trainer.estimated_stepping_batches
    told = "" if trainer.max_steps > 0 else f", epoch {epoch}"
    return (f" of {total}" if math.isfinite(total) else "") + told

"""Checkpoints as a fit goes on, and its end by SIGTERM, SIGUSR1 or Ctrl-C: after the step being taken, with a
checkpoint. Of several processes it is enough that one gets the signal."""

import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any, Self

import lightning as L

from mmpeft.files import require_space
from mmpeft.options import command_line
from mmpeft.runs.layout import CHECKPOINTS, LAST
from mmpeft.training.checkpoint_files import num_bytes
from mmpeft.training.processes import Reduced

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 143}
"""Signal -> exit code. Clusters announce the end of a job's time by SIGUSR1."""
SECONDS_BETWEEN, SHARE_OF_TIME = 60.0, 0.05
"""A checkpoint is written so long after the last one, or later where writing them took more than this share."""
NUM_COPIES = 7
"""Of what trains: the finetune, and in each of two checkpoints its weights and Adam's two moments."""


class StopSignals:
    """Inside, SIGTERM, SIGUSR1 and Ctrl-C end the process with their `EXIT_CODES`; while `deferred`, they wait to be
    looked at, and only a second one ends it at once. An error, too, ends with what is kept of the fit."""

    def __init__(self):
        self.deferred = False
        self.received: int | None = None
        """The signal that waits."""
        self.kept = "nothing was written"
        """What an end at once leaves, and how to go on."""
        self.go_on: str | None = None
        """The same of a fit that has a checkpoint."""

    def __enter__(self) -> Self:
        self._replaced = {number: signal.getsignal(number) for number in EXIT_CODES}
        self.install()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if self.go_on is not None and kind is not None and issubclass(kind, Exception):
            print(self.go_on, file=sys.stderr)
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._replaced.items():
                signal.signal(number, handler)

    def install(self) -> None:
        """Lightning puts handlers of its own in the place of ours whenever a loop begins; Python takes them from the
        main thread alone."""
        if threading.current_thread() is threading.main_thread():
            for number in EXIT_CODES:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.deferred and self.received is None:
            self.received = number
            _tell(number, "stopping after this step; once more stops at once")
        else:
            self.stop(number)

    def stop(self, number: int) -> None:
        """Raises:
        SystemExit: with the signal's exit code.
        """
        _tell(number, f"stopped; {self.kept}")
        raise SystemExit(EXIT_CODES[signal.Signals(number)])


def count_epochs(progress: Any) -> None:
    """Makes the counts of a fit in the middle of an epoch agree. Lightning (2.6.6) misses the beginning of an epoch
    that it goes on into from the end of the one before; the second time it then repeats an epoch.

    Args:
        progress: `trainer.fit_loop.epoch_progress`.
    """
    for counts in (progress.total, progress.current):
        counts.ready = counts.started = counts.processed + 1
        counts.completed = counts.processed


def _tell(number: int, text: str) -> None:
    print(f"\n{signal.Signals(number).name}: {text}", file=sys.stderr, flush=True)


class Checkpoints(L.Callback):
    """Writes ``checkpoints/last.ckpt``: after the first step, every minute, at the end, and when told to stop.

    Args:
        directory: the run's.
        signals: what may tell it to stop.
    """

    def __init__(self, directory: str | Path, signals: StopSignals):
        self.directory, self.signals = Path(directory), signals
        self._saved_step = 0
        self._next = 0.0
        self._due = 0

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.signals.install()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Tells before the first step where there will be no room."""
        if trainer.is_global_zero:
            last = self.directory / CHECKPOINTS / LAST
            last.parent.mkdir(parents=True, exist_ok=True)
            require_space(last, NUM_COPIES * num_bytes(pl_module.state_dict()))
        self._saved_step, self._next = trainer.global_step, 0.0
        if trainer.ckpt_path is None:
            self.signals.kept = "no step was finished; the same command begins again"
        else:
            self._tell_kept(Path(trainer.ckpt_path))
        self.signals.install()
        self.signals.deferred = True

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        whole = trainer.global_step > self._saved_step and not trainer.fit_loop._should_accumulate()
        if whole and (self._told_to_stop(trainer) or self._due):
            self._save(trainer)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """The curves have the last step by now."""
        count_epochs(trainer.fit_loop.epoch_progress)
        if trainer.global_step == self._saved_step and (number := self._told_to_stop(trainer)):
            self.signals.stop(number)

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Lightning goes on from there with the next step."""
        if not (number := self._told_to_stop(trainer)):
            return
        if trainer.global_step > self._saved_step:
            if trainer.fit_loop._should_accumulate():
                return  # gradients of half a step are in no checkpoint
            self._save(trainer)
        left_out = f"the validation after step {trainer.global_step} is left out"
        self.signals.kept = f"{left_out}; {self.signals.kept}"
        self.signals.stop(number)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.signals.deferred = False
        if trainer.global_step > self._saved_step:
            self._save(trainer)

    def _told_to_stop(self, trainer: Any) -> int | None:
        """The signal that any process got; the first one's clock says for all whether a checkpoint is due."""
        said = [int(self.signals.received == number) for number in EXIT_CODES]
        said.append(int(trainer.is_global_zero and time.monotonic() >= self._next))
        if isinstance(trainer.strategy, Reduced):
            said = trainer.strategy.sum_on_host(said)
        *signals, self._due = said
        return next((number for number, got in zip(EXIT_CODES, signals, strict=True) if got), None)

    def _save(self, trainer: L.Trainer) -> None:
        begun, last = time.monotonic(), self.directory / CHECKPOINTS / LAST
        trainer.save_checkpoint(last, weights_only=False)
        now = time.monotonic()
        self._saved_step = trainer.global_step
        self._next = now + max(SECONDS_BETWEEN, (now - begun) / SHARE_OF_TIME)
        self._tell_kept(last)

    def _tell_kept(self, checkpoint: Path) -> None:
        own = checkpoint.resolve().is_relative_to(self.directory.resolve())
        how = (
            ["--run", self.directory, "--resume"]
            if own
            else ["--run", self.directory, "--ckpt_path", checkpoint]
        )
        told = f"{checkpoint} keeps step {self._saved_step}. Go on with: {command_line('fit', *how)}"
        self.signals.kept = self.signals.go_on = told

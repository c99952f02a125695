"""Where a step's time goes: waiting on data, forward, backward, optimiser, and the encoder beside it; `fit --profile`.

On a GPU every part is waited for as it ends, so that it is told what is its own; without that the steps are faster.
"""

import time
from collections import defaultdict
from typing import Any

import lightning as L
import torch
from lightning.pytorch.profilers import Profiler
from rich.console import Console

from mmpeft.reporting.tables import make_table

PARTS = {
    "train_dataloader_next": "waiting on data",
    "training_step": "forward",
    "backward": "backward",
    "run_training_batch": "optimiser",  # less the two above, which Lightning calls inside of it
    "on_train_batch_end": "callbacks",
}
"""Last word of what Lightning calls an action -> the part that it belongs to."""


class StepTimes(Profiler):
    """Seconds of each part of the training so far, each without the parts inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.batches = 0
        self._open: list[str] = []
        self._since = 0.0

    def start(self, action_name: str) -> None:
        if part := self._part(action_name):
            self._pass_time()
            self._open.append(part)

    def stop(self, action_name: str) -> None:
        if self._part(action_name) and self._open:
            self._pass_time()
            self._open.pop()
            self.batches += action_name == "run_training_batch"

    def _part(self, action_name: str) -> str | None:
        return PARTS.get(action_name.rpartition(".")[2])

    def _pass_time(self) -> None:
        """The time since the last look is that of the innermost part."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


class StepTable(L.Callback):
    """Takes the place of the trainer's profiler, and prints what it found as the fit ends."""

    def __init__(self) -> None:
        self.times = StepTimes()
        self._encoded_before = 0.0

    def setup(self, trainer: Any, pl_module: L.LightningModule, stage: str) -> None:
        trainer.profiler = self.times

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._encoded_before = pl_module.engine.features.encoding.seconds

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        seconds, batches = self.times.seconds, self.times.batches
        if not batches:
            return
        total = sum(seconds.values())
        encoder = pl_module.engine.features.encoding.seconds - self._encoded_before
        title = f"where the time of {batches} batches went"
        table = make_table(title, **{"": "left", "ms a batch": "right", "share": "right"})
        parts = {part: seconds[part] for part in dict.fromkeys(PARTS.values())}
        for name, own in (parts | {"all of these": total, "encoder, beside them": encoder}).items():
            table.add_row(name, f"{1000 * own / batches:,.1f}", f"{own / total:.1%}")
        Console().print(table)

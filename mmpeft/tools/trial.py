"""A trial of a config: a few steps of its fit, which write nothing, for what it will take in memory and time."""

import statistics
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import lightning as L

from mmpeft.training.batches import steps_of_run
from mmpeft.training.cli import VisionLanguageCLI
from mmpeft.training.memory import MemoryTold

STEPS = 4
"""In the first everything is met for the first time."""


@dataclass
class Trial:
    """What a fit will take."""

    memory: list[str]
    """As a fit tells it when it begins."""
    steps: int
    """Of the whole fit."""
    seconds: float
    """A step."""
    trained: int
    """Numbers that train."""

    @property
    def told(self) -> list[str]:
        """In words: how long the steps take, and what the fit says of memory."""
        minutes = self.steps * self.seconds / 60
        return [
            f"About {minutes:,.0f} minutes on this machine: {self.steps:,} steps of {self.seconds:.2g} s; "
            "validations and images that are seen for the first time come on top."
            if minutes >= 1
            else f"Less than a minute on this machine: {self.steps:,} steps of {self.seconds:.2g} s.",
            f"{self.trained:,} numbers train.",
            *(line.strip() for line in self.memory),
        ]


def try_config(path: str) -> Trial:
    """Takes some steps.

    Raises:
        RefusedError: what a fit would refuse.
    """
    words = ["--config", path]
    short = [f"--trainer.fast_dev_run={STEPS}", "--trainer.limit_val_batches=0", "--data.cache.build=never"]
    wanted = VisionLanguageCLI.parse(words).trainer
    cli = VisionLanguageCLI.parse([*words, *short, "--trainer.enable_progress_bar=false"])
    clock, memory = _Clock(), MemoryTold()
    cli.trainer.callbacks += [clock, memory]  # pyright: ignore[reportAttributeAccessIssue]
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    module: Any = cli.model
    steps = steps_of_run(module.finetunes, module.batches.train(), wanted)
    own = [finetune.parameters for finetune in module.finetunes.values() if finetune.parameters]
    trained = sum(view.numel() for parameters in own for view in parameters.views)
    return Trial(memory.lines, steps, clock.seconds, trained)


class _Clock(L.Callback):
    """When training began, and when its steps ended."""

    def __init__(self) -> None:
        self._ends: list[float] = []

    @property
    def seconds(self) -> float:
        """Of a step, the median; the first counts only where it is the only one."""
        lengths = [after - before for before, after in pairwise(self._ends)]
        return statistics.median(lengths[1:] or lengths)

    def on_train_start(self, *_: Any) -> None:
        self._ends.append(time.perf_counter())

    def on_train_batch_end(self, *_: Any) -> None:
        self._ends.append(time.perf_counter())

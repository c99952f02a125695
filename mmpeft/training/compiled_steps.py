"""torch.compile as a setting of a fit: tried on its first batch, and told what it costs and saves."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import lightning as L
import torch

from mmpeft.data.batch import concatenate
from mmpeft.errors import RefusedError
from mmpeft.models.compilation import CompiledLayers
from mmpeft.training.batches import steps_of_run
from mmpeft.training.pieces import Pieces
from mmpeft.training.sharding import INSTEAD, sharded

Compile = bool | Literal["auto"]
"""Off, on, or on where it pays within the run."""
USUAL_SECONDS = 20.0
"""That compiling takes, for who must decide before: a model of 135M parameters on 2 cores took 16."""
USUAL_SHARE = 0.03
"""Of a batch's time that it saves, likewise: there the rest is matrix products and attention."""
ROUNDS = 3
"""How often each way is timed."""


@dataclass
class Trial:
    """What was found out on one batch."""

    compiling: float
    """Seconds."""
    eager: float
    """Seconds of forward and backward."""
    compiled: float
    """Likewise."""

    @property
    def pays_after(self) -> float:
        """Batches; infinitely many where nothing is saved."""
        saved = self.eager - self.compiled
        return self.compiling / saved if saved > 0 else float("inf")

    def told(self, batches: int) -> str:
        """The line that says it, with the batches that are planned."""
        times = f"a batch takes {self.compiled:.3g} s in place of {self.eager:.3g} s"
        if self.compiled >= self.eager:
            return f"compile: {self.compiling:.0f} s spent, and {times}: it never pays"
        pays = f"it pays after {self.pays_after:,.0f} batches, of {batches:,}"
        return f"compile: {self.compiling:.0f} s spent, {times}: {pays}"


class CompiledSteps(L.Callback):
    """Compiles what a fit's steps compute, for as long as it trains.

    Args:
        wanted: the setting.
    """

    backend = "inductor"
    """Of torch.compile."""

    def __init__(self, wanted: Compile):
        if not (isinstance(wanted, bool) or wanted == "auto"):
            raise RefusedError(f"model.compile is {wanted!r}; it is true, false or auto")
        self.wanted = wanted
        self._layers: CompiledLayers | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Goes before the others: those that write the run's directory begin where nothing can refuse the fit.

        Raises:
            RefusedError: the base is sharded.
        """
        trainer.callbacks = [self, *(own for own in trainer.callbacks if own is not self)]
        if self.wanted is False or stage != "fit" or not sharded(trainer):
            return
        why = "a sharded base has its weights elsewhere in every step, and no process can try steps out alone"
        if self.wanted is True:
            raise RefusedError(f"model.compile: {why}; set it to false, or {INSTEAD}")
        print(f"compile: left out, {why}", file=sys.stderr)
        self.wanted = False

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.wanted is False:
            return
        try:
            self._try(trainer, pl_module)
        except RefusedError as error:
            self._leave()
            if self.wanted is True:
                raise
            print(f"compile: left out, {error}", file=sys.stderr)

    def _try(self, trainer: Any, module: Any) -> None:
        """Raises:
        RefusedError: this model cannot be compiled.
        """
        batches, run = batches_to_come(trainer, module), rehearsal(trainer, module)
        run()
        if self.wanted == "auto" and batches * USUAL_SHARE * (eager := seconds(run)) < USUAL_SECONDS:
            told = f"{batches:,} batches of {eager:.3g} s are too few for it to pay"
            print(f"compile: left out, {told}", file=sys.stderr)
            return
        try:
            self._layers = CompiledLayers(module.model.reader, module.model.bank, self.backend)
            trial = try_out(run, self._layers)
        except (RefusedError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of a compiler, which is whatever it is
            reason = str(error).strip().partition("\n")[0]
            raise RefusedError(
                f"torch cannot compile this model here ({type(error).__name__}: {reason}); set model.compile to false"
            ) from error
        print(trial.told(batches), file=sys.stderr)
        if self.wanted == "auto" and trial.compiled >= trial.eager:
            self._leave()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._leave()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._leave()

    def _leave(self) -> None:
        if self._layers is not None:
            self._layers.leave()


def batches_to_come(trainer: Any, module: Any) -> int:
    """Of the whole training."""
    steps = steps_of_run(module.finetunes, module.batches.train(), trainer)
    return (steps - trainer.global_step) * trainer.accumulate_grad_batches


def rehearsal(trainer: Any, module: Any) -> Callable[[], None]:
    """Forward and backward of the first batch, in pieces where a step takes them; nothing of it stays."""
    model, device = module.model, module.model.device
    batch = concatenate([own for name in module.finetunes for own in module.batches.some(name, 1)]).to(device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    pieces = Pieces(lambda piece: (model.token_losses(piece).nll.sum(), lambda: None), trained)

    def run() -> None:
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                with trainer.precision_plugin.train_step_context():
                    loss = pieces.forward(batch)
                pieces.backward(loss)
        finally:
            module.zero_grad()

    return run


def try_out(run: Callable[[], None], layers: CompiledLayers) -> Trial:
    """Times a step as it is and compiled, in turn; afterwards it is compiled."""
    layers.use()
    first, times = seconds(run), ([], [])
    for _ in range(ROUNDS):
        layers.leave()
        times[0].append(seconds(run))
        layers.use()
        times[1].append(seconds(run))
    eager, compiled = map(median, times)
    return Trial(max(0.0, first - compiled), eager, compiled)


def seconds(run: Callable[[], None]) -> float:
    """By the clock, until a GPU has ended too."""
    begun = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun

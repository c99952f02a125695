"""Successive halving: of settings that train side by side the weak ones leave early, by their validation loss.

A setting is one finetune, or several that differ in their seed alone. What goes on is not changed by it: its steps are
those of a run of its own.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L

from mmpeft.errors import RefusedError
from mmpeft.training.batches import steps_of_run
from mmpeft.training.finetune import Finetune
from mmpeft.training.halving_rule import CURVE, check_steps, halving_steps, mean_loss, num_kept


class SuccessiveHalving(L.Callback):
    """Validates after some steps and lets only the best settings go on; the rows of the others are no longer computed.

    Args:
        settings: setting -> its finetunes; its loss is their mean.
        keep: share of the settings that goes on, above 0 and below 1.
        at: after which steps; by default as `halving_steps` has it. Empty lets all go on to the end.

    Raises:
        RefusedError: a share that halves nothing.
    """

    def __init__(self, settings: dict[str, list[str]], keep: float = 0.5, at: list[int] | None = None):
        if not 0 < keep < 1:
            raise RefusedError(
                f"keep is {keep}; it is the share of settings that goes on, above 0 and below 1"
            )
        self.settings, self.keep, self.at = settings, keep, at
        self.staying = list(settings)
        """The settings that go on."""
        self.steps: Sequence[int] = []
        """After which it halves, once a fit has begun."""
        self._halved = 0
        """Step of the last halving."""
        self._own: tuple[Any, Any] | None = None
        """What the trainer has of when to validate, while it is told otherwise."""

    def state_dict(self) -> dict[str, Any]:
        return {"staying": self.staying, "halved": self._halved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.staying, self._halved = state_dict["staying"], state_dict["halved"]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Says the rule, or refuses it, while nothing has been written."""
        module: Any = pl_module
        steps = steps_of_run(module.finetunes, module.batches.train(), trainer)
        self._plan(steps, module.finetunes)
        _require_validation(trainer, module.finetunes, halves=bool(self.steps))
        print("\n".join(self.rule(steps)), flush=True)
        # behind those that write curves, which find only as training begins where to go on
        trainer.callbacks = [own for own in trainer.callbacks if own is not self] + [self]  # pyright: ignore

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Of a resumed run: who has left; and the halving of the checkpoint's step, which is taken before it."""
        module: Any = pl_module
        for name in self._leavers(self.staying):
            module.batches.leave(name)
        if self._halved < trainer.global_step in self.steps:
            _validate(trainer)

    def _plan(self, steps: int, finetunes: Mapping[str, Finetune]) -> None:
        """Raises:
        RefusedError: there is nothing to compare, or a step after the end.
        """
        named = {name for names in self.settings.values() for name in names}
        if named != finetunes.keys() or len(self.settings) < 2:
            raise RefusedError(
                f"{len(self.settings)} settings are to be halved, of the finetunes {', '.join(sorted(named))}; the run "
                f"trains {', '.join(finetunes)}: give two settings or more, and each finetune to one of them"
            )
        self.steps = halving_steps(len(self.settings), self.keep, steps) if self.at is None else self.at
        check_steps(self.steps, steps)

    def rule(self, steps: int) -> list[str]:
        """What happens when, in words."""
        if not self.steps:
            return [f"{len(self.settings)} settings side by side, all of them for {steps} steps"]
        left, counts = len(self.settings), []
        for _ in self.steps:
            left = num_kept(left, self.keep) if left > 1 else 1
            counts.append(left)
        after = ", ".join(f"{step} ({count} go on)" for step, count in zip(self.steps, counts, strict=True))
        return [
            f"{len(self.settings)} settings side by side, of which the best {self.keep:.0%} by validation loss go on",
            f"  after step {after}; of {steps}",
        ]

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Has Lightning validate after this very step, whenever it otherwise does."""
        if trainer.global_step in self.steps:
            self._own = trainer.val_check_batch, trainer.check_val_every_n_epoch
            trainer.val_check_batch, trainer.check_val_every_n_epoch = 1, None

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        if self._own is not None:
            trainer.val_check_batch, trainer.check_val_every_n_epoch = self._own
            self._own = None
        if self._halved < trainer.global_step in self.steps:
            self._halve(trainer, pl_module)

    def _halve(self, trainer: L.Trainer, module: Any) -> None:
        step = self._halved = trainer.global_step
        if len(self.staying) == 1:
            return
        losses = {
            setting: mean_loss([float(trainer.callback_metrics[f"{CURVE}/{name}"]) for name in names])
            for setting, names in self.settings.items()
            if setting in self.staying
        }
        best = sorted(losses, key=losses.__getitem__)[: num_kept(len(losses), self.keep)]
        leavers = self._leavers(best)
        told = [f"{setting} ({loss:.4g})" for setting, loss in losses.items() if setting not in best]
        self.staying = [setting for setting in self.staying if setting in best]
        for name in leavers:
            module.batches.leave(name)
        print(f"step {step}: {', '.join(told)} leave; best {best[0]} ({losses[best[0]]:.4g})", flush=True)

    def _leavers(self, staying: Sequence[str]) -> list[str]:
        """The finetunes of all other settings."""
        return [name for setting, names in self.settings.items() if setting not in staying for name in names]


def _require_validation(trainer: L.Trainer, finetunes: Mapping[str, Finetune], halves: bool) -> None:
    """Raises:
    RefusedError: settings have no loss to be compared by, at the end or after the steps of the rule.
    """
    by_the_clock = getattr(trainer, "val_check_interval", None) is None  # Lightning sets it for steps alone
    validated = trainer.enable_validation and all(own.records.get("val") for own in finetunes.values())
    if (by_the_clock and halves) or not validated:
        raise RefusedError(
            "settings are compared by validation loss after some steps, but not all of them are validated then: give "
            "data.val, leave trainer.limit_val_batches as it is, and trainer.val_check_interval no time"
        )


def _validate(trainer: L.Trainer) -> None:
    """Before the next step, as Lightning does it after one."""
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True

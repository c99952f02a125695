"""The progress bar: what a person sees while a model trains."""

from typing import Any

from lightning.pytorch.callbacks import RichProgressBar


class Progress(RichProgressBar):
    """Lightning's bar for steps that take seconds: it moves with every batch, counts epochs from one and steps against
    ``trainer.max_steps`` where that is what ends the run."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=1)

    def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)  # the loggers' version, which for us is a folder's name
        if trainer.training and trainer.max_steps > 0:
            metrics = {"step": f"{trainer.global_step}/{trainer.max_steps}"} | metrics
        return metrics

    def _get_train_description(self, current_epoch: int) -> str:
        epochs = self.trainer.max_epochs or -1  # -1 where max_steps alone ends the run
        description = f"Epoch {current_epoch + 1}" + (f"/{epochs}" if epochs > 0 else "")
        return description.ljust(len(self.validation_description))  # bars of one length do not flicker

"""The curves of a fit, ``metrics.csv`` and TensorBoard's: begun when training begins; a resumed run goes on."""

import csv
import io
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.csv_logs import _ExperimentWriter
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyExperiment

from mmpeft.files import told_if_full, write_whole
from mmpeft.runs.layout import BOARD, CURVES


class CurvesLogger(CSVLogger):
    """Lightning's, which deletes an earlier ``metrics.csv`` before it is known whether there will be a fit.

    Args:
        directory: the run's.
    """

    def __init__(self, directory: str | Path):
        super().__init__(directory, name="", version="", flush_logs_every_n_steps=1)

    @property
    def experiment(self) -> Any:
        if self._experiment is None:
            self._experiment = _Writer(self.log_dir)  # pyright: ignore
        return self._experiment

    def begin(self, step: int, row: dict[str, float] | None = None) -> None:
        """Keeps the rows of the steps before this one, as of a run that stopped later than its last checkpoint.

        Args:
            step: the first to come.
            row: see `coming_row`; it is added where it never came.
        """
        path = Path(self.log_dir, CURVES)
        if not path.exists():
            return
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            rows = [row for row in reader if (row.get("step") or "").isdigit() and int(row["step"]) < step]
            columns = list(reader.fieldnames or [])
        _write_rows(path, columns, rows)
        self.experiment.metrics_keys = columns
        if row is not None and row["step"] < step and all(int(each["step"]) != row["step"] for each in rows):
            self.log_metrics({name: value for name, value in row.items() if name != "step"}, int(row["step"]))
            self.save()


class BoardLogger(TensorBoardLogger):
    """Lightning's, which begins a file before it is known whether there will be a fit.

    Args:
        directory: the run's.
    """

    def __init__(self, directory: str | Path):
        super().__init__(directory, name="", version=BOARD)
        self._begun = False

    @property
    def experiment(self) -> Any:
        return super().experiment if self._begun else DummyExperiment()

    def begin(self, step: int, row: dict[str, float] | None = None) -> None:
        """From here on there is a fit."""
        self._begun = True


def coming_row(trainer: Any) -> dict[str, float] | None:
    """The curves of the step that was just taken, where they are to be written: Lightning does so once the checkpoint
    of the step has been, and a process may be killed between the two."""
    connector, loop = trainer._logger_connector, trainer.fit_loop.epoch_loop
    if not trainer.training or not connector.should_update_logs:
        return None
    metrics = {name: float(value) for name, value in connector.metrics["log"].items()}
    return {**metrics, "epoch": trainer.current_epoch, "step": loop._batches_that_stepped}


class _Writer(_ExperimentWriter):
    """Without `log_hparams`: the run's config says them."""

    def _check_log_dir_exists(self) -> None:
        """Nothing is deleted."""

    def save(self) -> None:
        """Raises:
        RefusedError: there is no room for the rows.
        """
        path = Path(self.metrics_file_path)
        with told_if_full(path, sum(len(str(value)) + 1 for row in self.metrics for value in row.values())):
            super().save()

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        """A curve that begins later; what there was is never half there."""
        path = Path(self.metrics_file_path)
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        _write_rows(path, fieldnames, rows)

    def log_hparams(self, params: dict[str, Any]) -> None:
        """Nothing: config.yaml has them."""


def _write_rows(path: Path, columns: list[str], rows: list[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue())

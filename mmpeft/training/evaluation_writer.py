"""The callback that writes what a test or a prediction found."""

from collections.abc import Sequence
from pathlib import Path

import lightning as L

from mmpeft.data.records import Record
from mmpeft.errors import RefusedError
from mmpeft.evaluation.forgetting import check_held
from mmpeft.evaluation.results import write_predictions, write_results
from mmpeft.files import write_whole
from mmpeft.models.vision import NoVision
from mmpeft.runs.layout import config_of
from mmpeft.training.run_writer import typed, writes
from mmpeft.training.sharding import INSTEAD, sharded

NOT_WRITTEN = "trainer.fast_dev_run tries a batch: no results were written"


class EvaluationWriter(L.Callback):
    """Writes predictions, metrics and pictures after test, answers after predict.

    Args:
        folder: for the results.
        config: the settings of the test, as YAML, which lie beside its results.
        forgetting: whether a test also compares base and finetune on held-out plain text, and on images.
    """

    def __init__(self, folder: Path, config: str, forgetting: bool = False):
        self.folder, self.config, self.forgetting = folder, config, forgetting
        self._texts: list[str] = []
        self._records: Sequence[Record] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Before a model is loaded."""
        if self.forgetting and sharded(trainer):
            raise RefusedError(
                "--forgetting reads the base's weights in the first process, which has a part of them: leave it out, "
                f"or {INSTEAD}"
            )

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module, data = typed(pl_module, trainer)
        if self.forgetting:
            config, encoder = module.evaluation_config, module.model.vision_encoder
            self._texts = config.held_texts(data.columns)
            self._records = config.held_records(data.columns, not isinstance(encoder, NoVision))
            check_held(module.engine, self._records)  # what is refused is, before questions are answered

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module, _ = typed(pl_module, trainer)
        if not writes(trainer):
            return print(NOT_WRITTEN)
        run, metrics = Path(trainer.default_root_dir), module.evaluation_config.metrics
        write_whole(self.folder / config_of("test"), self.config)
        tokenizer = module.started.tokenizer
        write_results(run, self.folder, module.evaluation, metrics, tokenizer, self._texts, self._records)
        module.evaluation.log.discard()

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module, _ = typed(pl_module, trainer)
        if not writes(trainer):
            return print(NOT_WRITTEN)
        path = self.folder / "answers.jsonl"
        write_whole(self.folder / config_of("predict"), self.config)
        print(f"{write_predictions(path, module.evaluation)} answers written to {path}")
        module.evaluation.log.discard()

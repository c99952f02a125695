"""LightningCLI with our defaults: the run directory, its loggers, checkpoints, and an honest resume."""

import logging
import warnings
from pickle import UnpicklingError
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from mmpeft.errors import RefusedError
from mmpeft.evaluation.evaluate import EvaluationConfig
from mmpeft.training.checkpoint import AtomicCheckpointIO
from mmpeft.training.datamodule import VisionLanguageData
from mmpeft.training.malloc import keep_freed_memory
from mmpeft.training.module import VisionLanguageModule
from mmpeft.training.progress import Progress
from mmpeft.training.run_writer import EvaluationWriter, RunWriter

EXPECTED_WARNINGS = [
    r"LightningCLI's args parameter",
    r"Found \d+ module\(s\) in eval mode",  # the vision encoder stays so on purpose
    r".*does not have many workers",  # features are cached: the loader only copies
    r"predict returned None",  # answers go to a file as they come
    r".*isinstance\(treespec, LeafSpec\)",  # Lightning 2.6.6 on torch 2.15
]


class VisionLanguageCLI(LightningCLI):
    """`mmpeft fit|validate|test|predict`; everything goes to ``trainer.default_root_dir``."""

    def add_arguments_to_parser(self, parser: Any) -> None:
        # Lightning calls the arguments of `mmpeft test` a group of that name already.
        parser.add_class_arguments(EvaluationConfig, "test", as_group=False)
        parser.add_argument(
            "--forgetting",
            action="store_true",
            help="after `mmpeft test`, also compare base and finetune on test.held_text",
        )

    @classmethod
    def run(cls, arguments: list[str]) -> "VisionLanguageCLI":
        """Parses ``arguments`` (the subcommand first) and runs."""
        keep_freed_memory()
        return cls._make(arguments, run=True)

    @classmethod
    def parse(cls, arguments: list[str]) -> "VisionLanguageCLI":
        """Parses ``arguments`` and builds model, data and trainer without running or loading anything."""
        return cls._make(arguments, run=False)

    @classmethod
    def _make(cls, arguments: list[str], run: bool) -> "VisionLanguageCLI":
        for expected in EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message=expected)
        # Without Lightning's lines about hardware and its tips.
        logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
        # By itself argparse takes the misspelt --model.learning_rat for its neighbour.
        exact = {"allow_abbrev": False}
        return cls(
            VisionLanguageModule,
            VisionLanguageData,
            save_config_kwargs={"overwrite": True},  # a rerun is not an error
            seed_everything_default=0,
            trainer_defaults={"logger": None, "log_every_n_steps": 5, "devices": 1, "gradient_clip_val": 1.0},
            parser_kwargs={"prog": "mmpeft", **exact, **dict.fromkeys(cls.subcommands(), exact)},
            args=arguments,
            run=run,
        )

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        config: Any = self.config_init
        own = config[self.subcommand] if self.subcommand else config
        settings = own.trainer
        if own.forgetting and self.subcommand not in (None, "test"):
            raise RefusedError("--forgetting is measured by `mmpeft test`, after a fit")
        directory = settings.default_root_dir or "runs/default"
        kwargs |= {"default_root_dir": directory}
        if settings.logger is None:
            fitting = self.subcommand == "fit"
            csv = CSVLogger(directory, name="", version="", flush_logs_every_n_steps=1)
            board = TensorBoardLogger(directory, name="", version="tensorboard")
            kwargs["logger"] = [csv, board] if fitting else False
        callbacks = list(settings.callbacks or [])
        if settings.enable_progress_bar is not False and not _has(callbacks, ProgressBar):
            callbacks.append(Progress())
        if settings.enable_checkpointing is not False and not _has(callbacks, ModelCheckpoint):
            callbacks.append(ModelCheckpoint(f"{directory}/checkpoints", save_last="link"))
        kwargs["callbacks"] = callbacks
        try:
            trainer: Any = super().instantiate_trainer(**kwargs)
        except MisconfigurationException as error:  # Lightning's own word for impossible settings
            raise RefusedError(f"trainer: {error}") from error
        trainer.callbacks += [RunWriter(), EvaluationWriter(own.forgetting)]
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        return trainer

    def _parse_ckpt_path(self) -> None:
        """Lightning looks into the checkpoint for settings while it parses."""
        try:
            super()._parse_ckpt_path()
        except (UnpicklingError, EOFError, RuntimeError) as error:
            raise RefusedError(f"--ckpt_path: {error}, so it is no whole checkpoint") from error

    def instantiate_classes(self) -> None:
        """Hands the section ``test:`` to the module; its keys were once under ``data:``."""
        super().instantiate_classes()
        config: Any = self.config_init
        section = (config[self.subcommand] if self.subcommand else config).test
        moved = self.datamodule.moved
        for name, value in moved.items():
            if getattr(section, name) not in (getattr(EvaluationConfig, name), value):
                raise RefusedError(
                    f"data.{name} has moved to test.{name}, and both are given; keep the second"
                )
        self.model.evaluation_config = EvaluationConfig(**vars(section) | moved)


def _has(callbacks: list[Any], kind: type) -> bool:
    return any(isinstance(callback, kind) for callback in callbacks)

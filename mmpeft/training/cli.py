"""LightningCLI with our defaults: the run directory, its loggers, checkpoints, and an honest resume."""

import logging
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from mmpeft.config_files import PRESET_HELP, refuse_key, with_presets
from mmpeft.errors import RefusedError
from mmpeft.evaluation.evaluate import EvaluationConfig
from mmpeft.options import TellsBriefly
from mmpeft.runs.layout import WHAT_WAS_WANTED
from mmpeft.runs.occupancy import held, require_finished
from mmpeft.runs.result_folder import results_folder
from mmpeft.training.checkpoint_files import (
    AtomicCheckpointIO,
    damage,
    last_checkpoint,
    newest_whole_checkpoint,
)
from mmpeft.training.config_file import check_config_files
from mmpeft.training.curves import BoardLogger, CurvesLogger
from mmpeft.training.datamodule import VisionLanguageData
from mmpeft.training.evaluation_writer import EvaluationWriter
from mmpeft.training.folder_or_section import with_sections
from mmpeft.training.interruption import Checkpoints, StopSignals
from mmpeft.training.lightning_refusals import refusals_of_lightning
from mmpeft.training.malloc import keep_freed_memory
from mmpeft.training.memory import MemoryTold
from mmpeft.training.module import VisionLanguageModule
from mmpeft.training.processes import Reduced, check_processes, check_strategy, first_alone_tells, register
from mmpeft.training.profile import StepTable
from mmpeft.training.progress import LastValidation, progress
from mmpeft.training.run_option import check_run, of_run
from mmpeft.training.run_writer import RunWriter
from mmpeft.training.sharding import NAME, Sharded, check_sharded

EXPECTED_WARNINGS = [
    r"LightningCLI's args parameter",
    r"Found \d+ module\(s\) in eval mode",  # the vision encoder stays so on purpose
    r".*does not have many workers",  # features are cached: the loader only copies
    r"predict returned None",  # answers go to a file as they come
    r"The number of training batches .* is smaller than the logging interval",  # curves have its points all the same
    r".*isinstance\(treespec, LeafSpec\)",  # Lightning 2.6.6 on torch 2.15
    r"It is recommended to use .* sync_dist=True",  # curves are of all processes before they are logged
]


ASK = ("validate", "test", "predict")
OPTIONS = {
    "resume": (("fit",), "go on from the newest whole checkpoint of the run directory"),
    "profile": (("fit",), "print where the steps' time went, as a table at the end"),
    "forgetting": (("test",), "also compare base and finetune on test.held_text and test.held_images"),
    "untrained": (ASK, "ask what a fit would begin from, not a finished run"),
    "output": (
        ("test", "predict"),
        "folder for the results; by default the run directory, or RUN/tests/WHAT_DIFFERS where other data, a limit or "
        "other settings than the run's own are given",
    ),
}
"""Option -> the commands that have it, and what it does."""
WITH_A_VALUE = ("output",)


class _Parser(TellsBriefly, LightningArgumentParser):
    """Without pages of usage."""


class VisionLanguageCLI(LightningCLI):
    """`mmpeft fit|validate|test|predict`; everything goes to ``trainer.default_root_dir``."""

    def add_arguments_to_parser(self, parser: Any) -> None:
        # Lightning calls the arguments of `mmpeft test` a group of that name already.
        parser.add_class_arguments(EvaluationConfig, "test", as_group=False)
        parser.add_argument(
            "--run",
            help="run directory, instead of --config and trainer.default_root_dir: its own config.yaml",
        )
        parser.add_argument("--preset", type=refuse_key, help=PRESET_HELP)
        for name, (commands, text) in OPTIONS.items():
            how = {} if name in WITH_A_VALUE else {"action": "store_true"}
            parser.add_argument(f"--{name}", help=f"of {', '.join(commands)}: {text}", **how)

    @classmethod
    def run(cls, arguments: list[str]) -> "VisionLanguageCLI":
        """Parses ``arguments`` (the subcommand first) and runs."""
        keep_freed_memory()
        with first_alone_tells():
            return cls._make(arguments, run=True, words=arguments)

    @classmethod
    def parse(cls, arguments: list[str]) -> "VisionLanguageCLI":
        """Parses ``arguments`` and builds model, data and trainer without running or loading anything."""
        return cls._make(arguments, run=False)

    @classmethod
    def _make(cls, arguments: list[str], run: bool, words: list[str] | None = None) -> "VisionLanguageCLI":
        arguments = with_sections(of_run(with_presets(arguments)))
        check_config_files(arguments)
        register("ddp", Reduced)
        register(NAME, Sharded)
        for expected in EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message=expected)
        # Without Lightning's lines about hardware, its tips, and the seed, which config.yaml holds.
        for chatty in (
            "pytorch.utilities.rank_zero",
            "fabric.utilities.seed",
            "fabric.utilities.distributed",
        ):
            logging.getLogger(f"lightning.{chatty}").setLevel(logging.WARNING)
        # By itself argparse takes the misspelt --model.learning_rat for its neighbour.
        exact = {"allow_abbrev": False}
        return cls(
            VisionLanguageModule,
            VisionLanguageData,
            save_config_callback=None,  # the run's writers know when a fit has really begun
            seed_everything_default=0,
            trainer_defaults={
                **{"logger": None, "log_every_n_steps": 5, "devices": 1, "gradient_clip_val": 1.0},
                "enable_model_summary": False,  # one module without FLOPs; what trains is told at the end
            },
            parser_class=_Parser,
            # parsed for another command, the settings are those of a fit
            parser_kwargs={
                "prog": "mmpeft" if run else "mmpeft fit",
                **exact,
                **dict.fromkeys(cls.subcommands(), exact),
            },
            args=arguments,
            run=run,
            words=words,
        )

    def __init__(self, *args: Any, words: list[str] | None, **kwargs: Any):
        self._words = words  # other processes of the run are begun as the same command
        super().__init__(*args, **kwargs)

    def before_instantiate_classes(self) -> None:
        """What is wrong with the command is told before anything is built."""
        own: Any = self._own(self.config)
        for name, (commands, _) in OPTIONS.items():
            if own[name] not in (None, False) and self.subcommand not in (None, *commands):
                raise RefusedError(
                    f"--{name} belongs to `mmpeft {commands[0]}`, not to `mmpeft {self.subcommand}`"
                )
        directory = self._directory = Path(own.trainer.default_root_dir or "runs/default")
        if own.run is not None:
            check_run(Path(own.run), directory, [str(path) for path in own.config or []])
        self._signals = StopSignals()
        if self.subcommand in ASK and not own.untrained:
            require_finished(directory)
        if own.profile and own.trainer.profiler is not None:
            raise RefusedError("--profile and trainer.profiler both time the run; leave one of them out")
        if own.get("ckpt_path") == "last":
            own.ckpt_path = str(last_checkpoint(directory))
        if own.resume:
            if own.get("ckpt_path"):
                raise RefusedError(
                    "--resume finds the checkpoint by itself; leave --ckpt_path out, or --resume"
                )
            own.ckpt_path = str(newest_whole_checkpoint(directory))
            print(f"going on from {own.ckpt_path}")

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        settings, own = self._own(self.config_init).trainer, self._own(self.config_init)
        fitting, directory = self.subcommand == "fit", self._directory
        kwargs |= {"default_root_dir": str(directory)}
        if settings.logger is None:
            kwargs["logger"] = [CurvesLogger(directory), BoardLogger(directory)] if fitting else False
        check_strategy(settings.strategy)
        with refusals_of_lightning():
            trainer: Any = super().instantiate_trainer(**kwargs, **self._callbacks(settings))
        check_processes(trainer)
        check_sharded(trainer)
        trainer.strategy.words = self._words
        wanted, self._results = self._wanted(), directory
        if self.subcommand in ("test", "predict"):
            asked = wanted | ({"ckpt_path": str(own.ckpt_path)} if own.ckpt_path else {})
            self._results = results_folder(directory, self.subcommand, asked, self._defaults(), own.output)
        config = yaml.safe_dump(wanted, sort_keys=False, allow_unicode=True)
        trainer.callbacks += [
            LastValidation(),
            *([MemoryTold()] if fitting else []),
            RunWriter(config),
            EvaluationWriter(self._results, config, own.forgetting),
            *([StepTable()] if own.profile else []),
        ]
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        return trainer

    def _callbacks(self, settings: Any) -> dict[str, Any]:
        """The user's, with our bar and checkpoints; and what keeps Lightning from adding its own."""
        callbacks = list(settings.callbacks or [])
        if settings.enable_progress_bar is not False and not _has(callbacks, ProgressBar):
            callbacks.append(progress())
        if settings.enable_checkpointing is not False and not settings.fast_dev_run:
            callbacks.append(Checkpoints(self._directory, self._signals))
        return {
            "callbacks": callbacks,
            "enable_progress_bar": _has(callbacks, ProgressBar),
            "enable_checkpointing": _has(callbacks, ModelCheckpoint),
        }

    def _run_subcommand(self, subcommand: str) -> None:
        if subcommand in ("test", "predict"):
            self._signals.kept = "the answers so far are kept, and the same command goes on from them"
        trainer: Any = self.trainer
        writes = subcommand != "validate" and not trainer.fast_dev_run and trainer.is_global_zero
        with held(self._directory) if writes else nullcontext(), self._signals, refusals_of_lightning():
            super()._run_subcommand(subcommand)

    def _set_seed(self) -> None:
        with refusals_of_lightning("seed_everything"):
            super()._set_seed()

    def _parse_ckpt_path(self) -> None:
        """Lightning would look into the checkpoint for settings, of which ours have none; here damage is told early."""
        path = self._own(self.config).get("ckpt_path")
        if path and Path(path).is_file() and (reason := damage(path)):
            raise RefusedError(
                f"--ckpt_path: {path} is no whole checkpoint ({reason}); "
                "`mmpeft fit --resume` takes the newest whole one"
            )

    def _own(self, config: Any) -> Any:
        """The settings of the command that runs."""
        command = config.get("subcommand")
        return config[command] if command else config

    def _wanted(self) -> dict[str, Any]:
        """The sections of the config that decide about the outcome, in plain types."""
        parser: Any = self._parser(self.subcommand)
        settings = yaml.safe_load(parser.dump(self._own(self.config), skip_none=False, skip_check=True))
        moved = self.datamodule.moved
        settings["test"] |= moved
        settings["data"] |= dict.fromkeys(moved) | {"template": self.datamodule.template, "style": None}
        return {name: settings[name] for name in WHAT_WAS_WANTED if name in settings}

    def _defaults(self) -> dict[str, Any]:
        """The same sections where nothing is given."""
        parser: Any = self._parser(self.subcommand)
        settings = yaml.safe_load(parser.dump(parser.get_defaults(), skip_none=False, skip_check=True))
        return {name: settings[name] for name in WHAT_WAS_WANTED if name in settings}

    def instantiate_classes(self) -> None:
        """Hands the section ``test:`` to the module; its keys were once under ``data:``."""
        with refusals_of_lightning():
            super().instantiate_classes()
        section = self._own(self.config_init).test
        moved = self.datamodule.moved
        for name, value in moved.items():
            if getattr(section, name) not in (getattr(EvaluationConfig, name), value):
                raise RefusedError(
                    f"data.{name} has moved to test.{name}, and both are given; keep the second"
                )
        self.model.evaluation_config = EvaluationConfig(**vars(section) | moved)
        self.model.results = self._results


def _has(callbacks: list[Any], kind: type) -> bool:
    return any(isinstance(callback, kind) for callback in callbacks)

"""A sweep of eight settings of LoRA as one joint run with successive halving, against eight separate runs.

Fits in one process, each with its loading and its validations, but without the files and example answers that it would
write: those take as long of a short run as its steps. Both name the best setting.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.models import QV
from benchmarks.race import Race
from benchmarks.recipe import silent
from mmpeft.data.sources import load_records
from mmpeft.experiments.sweep import as_yaml
from mmpeft.experiments.sweep_plan import Plan, make_plan
from mmpeft.paths import LANGUAGE_MODEL, resolve
from mmpeft.training.cli import VisionLanguageCLI
from mmpeft.training.halving import SuccessiveHalving
from mmpeft.training.halving_rule import CURVE
from mmpeft.training.interruption import Checkpoints
from mmpeft.training.run_writer import RunWriter

APART, TOGETHER = "eight separate runs", "one sweep"
CHARACTERS, OF_TEMPLATE = 4, 9
"""Of a token, about; tokens that the template adds, about."""
Row = dict[str, str]
"""A question and its answer."""
GRID = ("--model.learning_rate", "[1e-4,3e-4,1e-3,3e-3]", "--model.adapter.rank", "[4,16]")


def sweep(
    model: str = LANGUAGE_MODEL, steps: int = 16, batch_size: int = 4, tokens: int = 32, validated: int = 32
) -> Iterator[Race]:
    """Four learning rates by two ranks on documentation of Python.

    Args:
        model: hub id, local folder, or an embedded one.
        steps: of a setting that stays.
        batch_size: rows of a step of each setting.
        tokens: of a row, about.
        validated: conversations of a validation.
    """
    sizes = {"train": steps * batch_size, "val": validated}
    rows = {split: _near(split, number, tokens) for split, number in sizes.items()}
    with TemporaryDirectory() as folder:
        yield sweep_race(Path(folder), model, rows, steps, batch_size)


def _near(split: str, number: int, tokens: int) -> list[Row]:
    """So many of the embedded docstrings, of about so many tokens."""
    records = load_records(resolve(f"embedded/docstrings/{split}.jsonl"))
    rows = [
        {"question": question, "answer": answer} for record in records for question, answer in record["turns"]
    ]
    lengths = {id(row): sum(len(text) for text in row.values()) / CHARACTERS + OF_TEMPLATE for row in rows}
    return sorted(rows, key=lambda row: abs(lengths[id(row)] - tokens))[:number]


def sweep_race(folder: Path, model: str, rows: Mapping[str, list[Row]], steps: int, batch_size: int) -> Race:
    """The sweep beside its settings one by one.

    Args:
        folder: for data, configs and runs.
        model: hub id, local folder, or an embedded one.
        rows: those of "train" and of "val".
        steps: of a setting that stays.
        batch_size: rows of a step of each setting.
    """
    plan = _plan(folder, model, rows, steps, batch_size)
    found: dict[str, dict[str, Any]] = {}
    _fit(folder, plan.alone(next(iter(plan.settings))) | {"trainer": _trainer(1)})

    def apart() -> None:
        losses = {
            name: float(_fit(folder, plan.alone(name)).trainer.callback_metrics[CURVE])
            for name in plan.settings
        }
        best = min(losses, key=losses.__getitem__)
        found[APART] = {"best": best, "val_loss": round(losses[best], 4)}

    def together() -> None:
        trainer = _fit(folder, plan.joint("", 0.5, None)).trainer
        (halving,) = (own for own in trainer.callbacks if isinstance(own, SuccessiveHalving))
        (best,) = halving.staying
        found[TOGETHER] = {
            "best": best,
            "val_loss": round(float(trainer.callback_metrics[f"{CURVE}/{best}"]), 4),
        }

    runs, facts = {APART: apart, TOGETHER: together}, {"steps": steps}
    return Race("8 settings", runs, (APART,), repeats=0, facts=facts, told=lambda name, _: found[name])


def _plan(folder: Path, model: str, rows: Mapping[str, list[Row]], steps: int, batch_size: int) -> Plan:
    for split, own in rows.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    config = {
        "model": {
            "language": {"name": model},
            "vision": None,
            "adapter": {
                "class_path": "mmpeft.adapters.LoraConfig",
                "init_args": {"target_modules": QV},
            },
            "warmup": 0.05,
        },
        "data": {
            "train": str(folder / "train.jsonl"),
            "val": str(folder / "val.jsonl"),
            "packing": {"batch_size": batch_size, "max_conversations": 1},
        },
        "trainer": _trainer(steps),
    }
    (folder / "config.yaml").write_text(as_yaml(config))
    return make_plan(str(folder / "config.yaml"), GRID)


def _trainer(steps: int) -> dict[str, Any]:
    return {"max_steps": steps, "enable_progress_bar": False, "log_every_n_steps": 1}


def _fit(folder: Path, settings: dict[str, Any]) -> VisionLanguageCLI:
    """Trains in this process: loading, steps and validations."""
    path = folder / "fit.yaml"
    settings["trainer"] |= {"default_root_dir": str(folder / "run")}
    path.write_text(as_yaml(settings))
    with silent(), redirect_stdout(sys.stderr):
        cli = VisionLanguageCLI.parse(["--config", str(path)])
        left_out = RunWriter, Checkpoints
        cli.trainer.callbacks = [own for own in cli.trainer.callbacks if not isinstance(own, left_out)]
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    return cli

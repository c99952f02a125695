"""The progress bar of a run: it moves with every step and says where the run is."""

import csv
import re
from types import SimpleNamespace

import pytest
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from mmpeft.cli import main
from mmpeft.training.cli import VisionLanguageCLI
from mmpeft.training.progress import LogLines, Progress
from tests.tiny import make_config, run_directory


@pytest.fixture
def terminal(monkeypatch):
    """Output that goes to a terminal."""
    monkeypatch.setattr("mmpeft.training.progress.in_a_terminal", lambda: True)


@pytest.mark.parametrize(
    ("length", "epoch"), [({"max_steps": 6}, "Epoch 2 "), ({"max_steps": -1, "max_epochs": 2}, "Epoch 2/2")]
)
def test_epochs_and_steps_are_counted_as_people_do(
    tmp_path, tiny_base, tiny_data, capsys, terminal, length, epoch
):
    trainer = {"enable_progress_bar": True, **length}
    config = make_config(tmp_path / "fit.yaml", tiny_base, tiny_data, trainer=trainer)
    cli = VisionLanguageCLI.run(["fit", "--config", str(config)])
    shown = capsys.readouterr().out
    assert epoch in shown
    assert "Epoch 0" not in shown
    assert "v_num" not in shown
    steps = re.findall(r"step: (\S+)", shown)
    assert steps[-1:] == (["6/6"] if "max_epochs" not in length else [])
    assert cli.trainer.progress_bar_callback.refresh_rate == 1  # pyright: ignore


@pytest.mark.parametrize("own", [TQDMProgressBar, RichProgressBar])
def test_ones_own_bar_takes_its_place(tiny_config, terminal, own):
    arguments = [f"--trainer.callbacks+={own.__name__}", "--trainer.enable_progress_bar=true"]
    trainer = VisionLanguageCLI.parse(["--config", str(tiny_config), *arguments]).trainer
    assert type(trainer.progress_bar_callback) is own
    default = VisionLanguageCLI.parse(["--config", str(tiny_config), arguments[1]]).trainer
    assert type(default.progress_bar_callback) is Progress
    none = VisionLanguageCLI.parse(["--config", str(tiny_config), "--trainer.enable_progress_bar=false"])
    assert none.trainer.progress_bar_callback is None


def test_a_bar_ends_where_it_says(tmp_path, tiny_base, tiny_data, terminal):
    """Five steps of two micro-batches, of epochs of four: the third epoch has two batches left."""
    trainer = {"enable_progress_bar": True, "max_steps": 5, "accumulate_grad_batches": 2}
    config = make_config(tmp_path / "fit.yaml", tiny_base, tiny_data, trainer=trainer)
    lengths = []

    class Watched(Progress):
        def on_train_epoch_start(self, trainer, pl_module):
            super().on_train_epoch_start(trainer, pl_module)
            lengths.append(self.total_train_batches)

    cli = VisionLanguageCLI.parse(["--config", str(config)])
    cli.trainer.callbacks[:] = [Watched() if type(c) is Progress else c for c in cli.trainer.callbacks]
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    assert lengths == [4, 4, 2]


def test_a_log_file_gets_a_line_every_ten_seconds(tmp_path, tiny_base, tiny_data, capsys, monkeypatch):
    """The clock goes four seconds at each look, twice as a line is told."""
    clock = iter(range(0, 10_000, 4))
    monkeypatch.setattr("mmpeft.training.progress.time", SimpleNamespace(monotonic=lambda: next(clock)))
    trainer = {"enable_progress_bar": True, "max_steps": 8}
    config = make_config(tmp_path / "fit.yaml", tiny_base, tiny_data, trainer=trainer)
    cli = VisionLanguageCLI.run(["fit", "--config", str(config)])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert any(isinstance(callback, LogLines) for callback in cli.trainer.callbacks)
    assert [line.split()[1] for line in lines] == ["3", "6", "8"]
    assert all(" of 8, " in line and "train_loss" in line and "s a step" in line for line in lines)


def test_a_log_says_how_many_steps_there_will_be_and_ends_with_one_line(
    tmp_path, tiny_base, tiny_data, capsys, monkeypatch
):
    """Epochs of four steps."""
    monkeypatch.setattr("mmpeft.training.progress.SECONDS_BETWEEN_LINES", 0)
    trainer = {"enable_progress_bar": True, "max_steps": -1, "max_epochs": 2}
    config = make_config(tmp_path / "fit.yaml", tiny_base, tiny_data, trainer=trainer)
    main(["fit", "--config", str(config)])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    epochs = [1] * 4 + [2] * 4
    assert [line.split(", ")[:2] for line in lines] == [
        [f"step {step} of 8", f"epoch {epoch}"] for step, epoch in enumerate(epochs, start=1)
    ]


def test_the_last_line_is_of_the_last_epoch(tmp_path, tiny_base, tiny_data, capsys):
    """Of a fit that is over before ten seconds are it is the only one."""
    trainer = {"enable_progress_bar": True, "max_steps": -1, "max_epochs": 2}
    main(["fit", "--config", str(make_config(tmp_path / "fit.yaml", tiny_base, tiny_data, trainer=trainer))])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert line.startswith("step 8 of 8, epoch 2, ")


@pytest.mark.parametrize(("steps", "validated"), [(6, ["3", "5"]), (4, ["3"])], ids=["between", "at the end"])
def test_every_fit_ends_with_a_validation(tmp_path, tiny_base, tiny_data, steps, validated):
    """Epochs of four steps: once in every one, and once more where it ends in between."""
    config = make_config(tmp_path / "fit.yaml", tiny_base, tiny_data, trainer={"max_steps": steps})
    main(["fit", "--config", str(config)])
    with (run_directory(config) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["val_loss"]]
    assert [row["step"] for row in rows] == validated

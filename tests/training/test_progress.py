"""The progress bar of a run: it moves with every step and says where the run is."""

import re

import pytest
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from mmpeft.training.cli import VisionLanguageCLI
from mmpeft.training.progress import Progress
from tests.tiny import make_config


@pytest.mark.parametrize(
    ("length", "epoch"), [({"max_steps": 6}, "Epoch 2 "), ({"max_steps": -1, "max_epochs": 2}, "Epoch 2/2")]
)
def test_epochs_and_steps_are_counted_as_people_do(tmp_path, tiny_base, tiny_data, capsys, length, epoch):
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
def test_ones_own_bar_takes_its_place(tiny_config, own):
    arguments = [f"--trainer.callbacks+={own.__name__}", "--trainer.enable_progress_bar=true"]
    trainer = VisionLanguageCLI.parse(["--config", str(tiny_config), *arguments]).trainer
    assert type(trainer.progress_bar_callback) is own
    default = VisionLanguageCLI.parse(["--config", str(tiny_config), arguments[1]]).trainer
    assert type(default.progress_bar_callback) is Progress
    none = VisionLanguageCLI.parse(["--config", str(tiny_config), "--trainer.enable_progress_bar=false"])
    assert none.trainer.progress_bar_callback is None

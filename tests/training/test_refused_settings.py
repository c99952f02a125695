"""Settings of the trainer and of the command that cannot be meant: told in one line, by Lightning's word or ours."""

import lightning as L
import pytest
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from mmpeft.cli import main
from mmpeft.training.lightning_refusals import refusals_of_lightning
from tests.training.run_life import contents, make


def test_several_devices_are_refused_before_their_processes_start(
    tmp_path, tiny_base, tiny_data, monkeypatch
):
    """Each would find that another one writes the run, and say that instead."""

    def launch(*_, **__):
        raise AssertionError("processes were started")

    monkeypatch.setattr(_SubprocessScriptLauncher, "launch", launch)
    config = make(tmp_path, tiny_base, tiny_data, devices=2)
    with pytest.raises(SystemExit, match=r"the trainer has 2 processes.*set trainer\.devices to 1"):
        main(["fit", "--config", str(config)])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--trainer.val_check_interval=5000", r"trainer: `val_check_interval` \(5000\) must be less than"),
        ("--trainer.accelerator=tpuu", "trainer: .*invalid accelerator name"),
        ("--trainer.barebones=true", "trainer: .*barebones"),
        ("--seed_everything=-1", "seed_everything: -1 is not in bounds"),
        ("--ckpt_path=best", "trainer: .*best"),
        ("--output=results", r"--output belongs to `mmpeft test`, not to `mmpeft fit`"),
        ("--data.train=null", r"`mmpeft fit` needs data: set --data\.train"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_a_line(tmp_path, tiny_base, tiny_data, word, message):
    config = make(tmp_path, tiny_base, tiny_data)
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        main(["fit", "--config", str(config), word])


def test_a_validation_has_no_folder_for_results(whole):
    with pytest.raises(SystemExit, match=r"--output belongs to `mmpeft test`, not to `mmpeft validate`"):
        main(["validate", "--run", str(whole), "--output=results"])


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "--trainer.max_steps=5",
            r"trainer\.max_steps is 5, but the checkpoint has taken 8 steps; set it to 8",
        ),
        ("--trainer.max_epochs=1", "trainer: .*current_epoch=2.*max_epochs=1"),
    ],
)
def test_a_run_that_took_more_steps_than_it_is_to_have_is_not_written_as_one_of_fewer(stopped, word, message):
    before = contents(stopped)
    with pytest.raises(SystemExit, match=message):
        main(["fit", "--run", str(stopped), "--resume", word])
    assert contents(stopped) == before


def test_an_error_of_our_own_code_stays_a_fault():
    class Faulty(L.Callback):
        def on_fit_start(self, *_):
            raise ValueError("a fault")

    with pytest.raises(ValueError, match="a fault") as raised, refusals_of_lightning():
        Faulty().on_fit_start()
    assert type(raised.value) is ValueError

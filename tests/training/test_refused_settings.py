"""Settings of the trainer and of the command that cannot be meant: told in one line, by Lightning's word or ours."""

import lightning as L
import pytest
from lightning.pytorch.plugins.environments import TorchElasticEnvironment

from mmpeft.cli import main
from mmpeft.errors import RefusedError
from mmpeft.training.cli import VisionLanguageCLI
from mmpeft.training.lightning_refusals import refusals_of_lightning
from mmpeft.training.processes import Launcher
from tests.training.run_life import contents, make


@pytest.mark.parametrize(
    ("strategy", "why"),
    [
        *(
            (name, "shards the base, .*quantization=nf4")
            for name in ("fsdp", "deepspeed_stage_2", "xla_fsdp")
        ),
        ("ddp_spawn", "is another way of what ddp does"),
        ("ddp_find_unused_parameters_true", "is another way of what ddp does"),
    ],
)
def test_strategies_that_cannot_divide_these_runs_are_refused_before_processes_start(
    tmp_path, tiny_base, tiny_data, monkeypatch, strategy, why
):
    def launch(*_, **__):
        raise AssertionError("processes were started")

    monkeypatch.setattr(Launcher, "launch", launch)
    config = make(tmp_path, tiny_base, tiny_data, devices=2, strategy=strategy)
    with pytest.raises(SystemExit, match=f"trainer.strategy is {strategy}, which {why}"):
        main(["fit", "--config", str(config)])
    assert not (tmp_path / "run").exists()


def test_processes_of_torchrun_that_the_trainer_does_not_know_are_refused(
    tmp_path, tiny_base, tiny_data, monkeypatch
):
    """Each would train all of the run."""
    monkeypatch.setattr(TorchElasticEnvironment, "detect", staticmethod(lambda: False))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(
        SystemExit, match=r"torchrun began 4 processes, but the trainer has one.*trainer\.devices"
    ):
        main(["fit", "--config", str(make(tmp_path, tiny_base, tiny_data))])


def test_processes_are_begun_as_a_command_alone(tmp_path, tiny_base, tiny_data):
    """Lightning would begin this suite once more."""
    cli = VisionLanguageCLI.parse(["--config", str(make(tmp_path, tiny_base, tiny_data, devices=2))])
    with pytest.raises(
        RefusedError, match="2 processes, which a command of mmpeft can begin, but this is none"
    ):
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--trainer.val_check_interval=5000", r"trainer: `val_check_interval` \(5000\) must be less than"),
        ("--trainer.accelerator=tpuu", "trainer: .*invalid accelerator name"),
        (
            "--trainer.precision=bf16-mixed",
            r"trainer\.precision is bf16-mixed, .* set model\.language\.dtype .* 32-true",
        ),
        ("--trainer.precision=16-mixed", r"trainer\.precision is bf16-mixed"),
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

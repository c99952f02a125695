"""Settings of the trainer and of the command that cannot be meant: told in one line, by Lightning's word or ours."""

from types import SimpleNamespace
from typing import Any, cast

import lightning as L
import pytest
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy

from mmpeft.cli import main
from mmpeft.errors import RefusedError
from mmpeft.hashing import hash_json
from mmpeft.training.cli import VisionLanguageCLI
from mmpeft.training.lightning_refusals import refusals_of_lightning
from mmpeft.training.processes import DIGITS, Launcher, Reduced, require_alike
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


@pytest.mark.parametrize(
    ("program", "known"),
    [
        ("torchrun", {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "4"}),
        ("srun", {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"}),
    ],
)
def test_processes_that_the_trainer_does_not_know_are_refused(
    tmp_path, tiny_base, tiny_data, monkeypatch, program, known
):
    """Each would train all of the run."""
    monkeypatch.setattr(TorchElasticEnvironment, "detect", staticmethod(lambda: False))
    for name, value in known.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        SystemExit, match=rf"{program} began 4 processes, but the trainer has one.*trainer\.devices"
    ):
        main(["fit", "--config", str(make(tmp_path, tiny_base, tiny_data))])


def test_one_of_several_machines_must_know_which_it_is(tmp_path, tiny_base, tiny_data, monkeypatch):
    """It would wait for the others, which cannot find it."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    config = make(tmp_path, tiny_base, tiny_data, num_nodes=2)
    with pytest.raises(
        SystemExit, match=r"num_nodes is 2, .*torchrun or srun.* set MASTER_PORT, NODE_RANK there"
    ):
        main(["fit", "--config", str(config)])


@pytest.mark.parametrize(
    ("known", "devices", "told"),
    [
        ({}, 2, "has 2 processes, but SLURM began 1: .* --ntasks-per-node=2"),
        ({"SLURM_NTASKS": "4"}, 1, "trainer: .*--ntasks-per-node=4"),
    ],
)
def test_tasks_of_slurm_that_are_not_the_trainers_are_refused(
    tmp_path, tiny_base, tiny_data, monkeypatch, known, devices, told
):
    """With one of two Lightning would train alone."""
    job = {"SLURM_NTASKS": "1", "SLURM_JOB_ID": "5", "SLURM_JOB_NAME": "fit", "SLURM_NODEID": "0"}
    for name, value in (
        job | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODELIST": "here"} | known
    ).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=told):
        main(["fit", "--config", str(make(tmp_path, tiny_base, tiny_data, devices=devices))])


def test_devices_that_a_processor_cannot_have_are_refused(tmp_path, tiny_base, tiny_data):
    with pytest.raises(
        SystemExit, match="trainer: `devices` selected with `CPUAccelerator` should be an int > 0"
    ):
        main(["fit", "--config", str(make(tmp_path, tiny_base, tiny_data, devices=[0, 1]))])


def test_processes_that_do_not_find_each_other_say_so_in_a_line(monkeypatch):
    def taken(_):
        raise RuntimeError("The server socket has failed to listen (port: 29500)\nframe #0: c10d")

    monkeypatch.setattr(DDPStrategy, "setup_distributed", taken)
    with pytest.raises(RefusedError, match=r"cannot be reached \(The server socket .* 29500\)\);"):
        Reduced(accelerator=CPUAccelerator()).setup_distributed()


def test_processes_that_do_not_train_the_same_are_refused():
    """Each plans by itself which rows are its own: some would be nobody's, and some would wait for ever."""
    others = [hash_json({"records": "these"}), hash_json({"records": "those"})]

    class Two:
        world_size = 2

        def __init__(self, other):
            self.other = other

        def sum_on_host(self, values):
            return [own + int(self.other[:DIGITS], 16) for own in values]

    require_alike(cast("Reduced", Two(others[0])), {"records": "these"})
    with pytest.raises(RefusedError, match="do not have the same settings, data and base"):
        require_alike(cast("Reduced", Two(others[1])), {"records": "these"})


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


def test_a_curve_that_a_callback_misses_is_told_with_those_there_are():
    own: Any = SimpleNamespace(callback_metrics={"val_loss/a": 1.0}, fast_dev_run=False)
    with (
        pytest.raises(RefusedError, match=r"^trainer: Early stopping .*`val_loss` .*`val_loss/a`"),
        refusals_of_lightning(),
    ):
        EarlyStopping("val_loss")._run_early_stopping_check(own)

"""SIGTERM and Ctrl-C: a fit ends after its step, with a checkpoint, a line and the signal's exit code."""

import json
import os
import signal
import subprocess
import sys
import time

import lightning as L
import pytest
import torch
from PIL import Image

from mmpeft.cli import main
from mmpeft.experiments.steps import MMPEFT
from mmpeft.runs.occupancy import held
from tests.tiny import run_directory
from tests.training.run_life import STEPS, Signal, assert_equal_runs, fit, make, stopped_at


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGINT, 130)]
)
def test_a_signal_ends_a_fit_after_its_step_and_resume_goes_on_as_if_it_had_not_stopped(
    tmp_path, tiny_base, tiny_data, whole, capsys, number, code
):
    config = make(tmp_path, tiny_base, tiny_data, **stopped_at(2, number))
    with pytest.raises(SystemExit) as stopped:
        fit(config)
    run = run_directory(config)
    assert stopped.value.code == code
    told = capsys.readouterr().err
    assert f"{run}/checkpoints/last.ckpt keeps step 3. Go on with: mmpeft fit --run {run} --resume" in told
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3
    main(["fit", "--run", str(run), "--resume", "--trainer.callbacks=null"])
    assert_equal_runs(whole, run)


class SignalAtStart(L.Callback):
    """Sends this process a signal when nothing can refuse the fit any more, before its first step."""

    def on_train_batch_start(self, *_):
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("how", ["new", "--resume", "--ckpt_path"])
def test_a_signal_before_the_first_step_says_what_there_is(
    stopped, tmp_path, tiny_base, tiny_data, capsys, how
):
    callback = json.dumps([{"class_path": f"{__name__}.SignalAtStart"}])
    last, other = stopped / "checkpoints" / "last.ckpt", tmp_path / "other"
    told, words = {
        "new": ("no step was finished; the same command begins again", [f"--run={stopped}"]),
        "--resume": (
            f"{last} keeps step {STEPS}. Go on with: mmpeft fit --run {stopped} --resume",
            [f"--run={stopped}", "--resume"],
        ),
        "--ckpt_path": (
            f"{last} keeps step {STEPS}. Go on with: mmpeft fit --run {other} --ckpt_path {last}",
            [f"--config={stopped}/config.yaml", f"--trainer.default_root_dir={other}", f"--ckpt_path={last}"],
        ),
    }[how]
    with pytest.raises(SystemExit) as ended:
        main(["fit", *words, f"--trainer.callbacks={callback}", f"--trainer.max_steps={STEPS + 1}"])
    assert ended.value.code == 143
    assert f"SIGTERM: stopped; {told}\n" in capsys.readouterr().err


class SignalInValidation(L.Callback):
    """Sends this process a signal while the run is validated after some step."""

    def __init__(self, step: int):
        self.step = step

    def on_validation_batch_start(self, trainer, *_):
        if trainer.global_step == self.step and not trainer.sanity_checking:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    "step", [pytest.param(2, marks=pytest.mark.slow), 4, pytest.param(8, marks=pytest.mark.slow)]
)
def test_a_signal_in_a_validation_keeps_the_steps_before_it(tmp_path, tiny_base, tiny_data, capsys, step):
    """In an epoch, at its end, and at that of the fit."""
    often = {"val_check_interval": 2}
    undisturbed = fit(make(tmp_path / "whole", tiny_base, tiny_data, **often))
    callback = {"class_path": f"{__name__}.SignalInValidation", "init_args": {"step": step}}
    config = make(tmp_path / "stopped", tiny_base, tiny_data, **often, callbacks=[callback])
    with pytest.raises(SystemExit) as stopped:
        fit(config)
    run = run_directory(config)
    assert stopped.value.code == 143
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == step
    assert f"the validation after step {step} is left out" in capsys.readouterr().err
    main(["fit", "--run", str(run), "--resume", "--trainer.callbacks=null"])
    assert_equal_runs(undisturbed, run, unvalidated=step - 1)


def test_a_fit_that_is_stopped_at_the_end_of_one_epoch_after_another_has_no_more_of_them(
    tmp_path, tiny_base, tiny_data
):
    """Lightning by itself would repeat one after the second stop."""
    epochs = {"max_steps": -1, "max_epochs": 3}
    undisturbed = fit(make(tmp_path / "whole", tiny_base, tiny_data, **epochs))
    config = make(tmp_path / "stopped", tiny_base, tiny_data, **epochs, **stopped_at(3, signal.SIGTERM))
    with pytest.raises(SystemExit):
        fit(config)
    run = run_directory(config)
    again = json.dumps(stopped_at(7, signal.SIGTERM)["callbacks"])
    with pytest.raises(SystemExit):
        main(["fit", "--run", str(run), "--resume", f"--trainer.callbacks={again}"])
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 8
    main(["fit", "--run", str(run), "--resume", "--trainer.callbacks=null"])
    assert_equal_runs(undisturbed, run, missing=lambda row: "val_loss" in row)


def test_a_signal_to_the_process_leaves_no_traceback(tmp_path, tiny_base, tiny_data):
    """From outside, in the middle of a long fit, as a cluster does it."""
    config = make(tmp_path, tiny_base, tiny_data, max_steps=100_000, limit_val_batches=0)
    process = subprocess.Popen(
        [sys.executable, *MMPEFT, "fit", "--config", str(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    last, begun = run_directory(config) / "checkpoints" / "last.ckpt", time.monotonic()
    while not last.exists() and time.monotonic() < begun + 120:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 143, told
    assert "Traceback" not in told
    assert "stopping after this step" in told
    with held(run_directory(config)):
        pass  # the lock went with the process


@pytest.mark.parametrize(("command", "kept"), [("fit", ""), ("caption", "the same command goes on from it")])
def test_ctrl_c_while_the_libraries_come_in_is_one_line(tmp_path, tiny_run, command, kept):
    """Raised in the middle of foreign imports, it leaves pages of traceback."""
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    words = {
        "fit": ["fit", "--config", "configs/tfew.yaml"],
        "caption": [
            "caption",
            str(tmp_path),
            "--run",
            str(tiny_run),
            "--output",
            str(tmp_path / "out.jsonl"),
        ],
    }[command]
    process = subprocess.Popen(
        [sys.executable, *MMPEFT, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert told.strip().startswith("SIGINT: stopped")
    assert kept in told
    assert "Traceback" not in told


def test_a_second_signal_does_not_wait(tmp_path, tiny_base, tiny_data):
    class Twice(Signal):
        def on_before_optimizer_step(self, trainer, *_):
            super().on_before_optimizer_step(trainer)
            super().on_before_optimizer_step(trainer)

    from mmpeft.training.cli import VisionLanguageCLI

    cli = VisionLanguageCLI.parse(["--config", str(make(tmp_path, tiny_base, tiny_data))])
    cli.trainer.callbacks.append(Twice(signal.SIGTERM, 2))
    with cli._signals, pytest.raises(SystemExit) as stopped:
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    assert stopped.value.code == 143
    assert cli.trainer.global_step == 2


def test_the_first_checkpoint_is_there_after_the_first_step(tmp_path, tiny_base, tiny_data):
    class Crash(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 1:
                raise ZeroDivisionError

    from mmpeft.training.cli import VisionLanguageCLI

    cli = VisionLanguageCLI.parse(["--config", str(make(tmp_path, tiny_base, tiny_data))])
    cli.trainer.callbacks.append(Crash())
    with pytest.raises(ZeroDivisionError):
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 1

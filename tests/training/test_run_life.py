"""A run never lies: what is on disk is of the run that it says, however that was stopped, refused or asked again."""

import csv
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import lightning as L
import pytest
import torch
import yaml
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from mmpeft.cli import main
from mmpeft.errors import RefusedError
from mmpeft.experiments.steps import MMPEFT
from mmpeft.files import save_tensors, write_whole
from mmpeft.runs.manifest import MANIFEST
from mmpeft.runs.occupancy import held
from mmpeft.training.checkpoint_files import AtomicCheckpointIO, damage, newest_whole_checkpoint
from tests.tiny import make_config, run_directory

STEPS = 8


class Signal(L.Callback):
    """Sends this process a signal in the middle of a step."""

    def __init__(self, number: int, step: int):
        self.number, self.step = number, step

    def on_before_optimizer_step(self, trainer, *_):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)


def make(folder, base, data, **trainer):
    own = {"max_steps": STEPS, "log_every_n_steps": 1, **trainer}
    return make_config(folder / "config.yaml", base, data, trainer=own)


def stopped_at(step, number):
    own = {"number": int(number), "step": step}
    return {"callbacks": [{"class_path": f"{__name__}.Signal", "init_args": own}]}


def fit(config, *words):
    main(["fit", "--config", str(config), *words])
    return run_directory(config)


def trained(run):
    folder = run / "adapters" / "default"
    return {path.name: load_file(path) for path in folder.glob("*.safetensors")}


def assert_equal_runs(one, other, unvalidated=None):
    for name, tensors in trained(one).items():
        for key, tensor in tensors.items():
            assert torch.equal(trained(other)[name][key], tensor), (name, key)
    left_out = [row for row in curves(one) if "val_loss" in row and row["step"] == str(unvalidated)]
    assert len(left_out) == (unvalidated is not None)
    assert [row for row in curves(one) if row not in left_out] == curves(other)


def curves(run):
    with (run / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_base, tiny_data):
    """A run that nothing disturbed."""
    return fit(make(tmp_path_factory.mktemp("whole"), tiny_base, tiny_data))


# stopped


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
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


class SignalInValidation(L.Callback):
    """Sends this process a signal while the run is validated after some step."""

    def __init__(self, step: int):
        self.step = step

    def on_validation_batch_start(self, trainer, *_):
        if trainer.global_step == self.step and not trainer.sanity_checking:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("step", [2, 4, 8])
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
        "caption": ["caption", str(tmp_path), "--run", str(tiny_run)],
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


def test_stage_2_before_stage_1_is_told_before_anything_is_loaded(
    tmp_path, tiny_base, tiny_data, monkeypatch
):
    monkeypatch.setattr("mmpeft.training.start.build_model", None)
    config = make(tmp_path, tiny_base, tiny_data)
    with pytest.raises(
        SystemExit, match=r"model\.start_from: .*gone is no run of mmpeft.*set model\.start_from to null"
    ):
        fit(config, f"--model.start_from={tmp_path / 'gone'}")


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


# resumed


def flip(path, share=0.5):
    content = bytearray(path.read_bytes())
    content[int(share * len(content))] ^= 1
    path.write_bytes(content)


@pytest.fixture
def stopped(tmp_path, whole):
    """A run directory with two checkpoints and no end."""
    run = shutil.copytree(whole, tmp_path / "stopped")
    (run / MANIFEST).unlink()
    return run


@pytest.mark.parametrize(
    "harm", [flip, lambda path: os.truncate(path, 999), lambda path: path.write_bytes(b"")]
)
def test_resume_passes_over_a_damaged_checkpoint_aloud(stopped, whole, capsys, harm):
    harm(stopped / "checkpoints" / "last.ckpt")
    main(["fit", "--run", str(stopped), "--resume"])
    told = capsys.readouterr()
    assert f"{stopped}/checkpoints/last.ckpt is damaged" in told.err
    assert f"going on from {stopped}/checkpoints/previous.ckpt" in told.out
    assert_equal_runs(whole, stopped)


def test_a_flipped_byte_anywhere_in_a_tensor_is_noticed(stopped):
    path = stopped / "checkpoints" / "last.ckpt"
    data = path.read_bytes()
    tensor = max(torch.load(path, weights_only=True)["state_dict"].values(), key=torch.numel)
    flip(path, share=(data.index(tensor.numpy().tobytes()) + 5) / len(data))
    with pytest.raises(
        SystemExit, match=r"last\.ckpt is no whole checkpoint \(.* does not have its checksum\)"
    ):
        main(["fit", "--run", str(stopped), "--ckpt_path", str(path)])


def test_resume_without_a_whole_checkpoint_is_refused(stopped):
    (folder := stopped / "checkpoints" / "folder.ckpt").mkdir()
    assert newest_whole_checkpoint(stopped).name == "last.ckpt"
    assert damage(folder) == "it cannot be read: Is a directory"
    folder.rmdir()
    for path in (stopped / "checkpoints").iterdir():
        path.write_bytes(b"")
    with pytest.raises(SystemExit, match=r"--resume: .*it is empty.*it is empty"):
        main(["fit", "--run", str(stopped), "--resume"])
    shutil.rmtree(stopped / "checkpoints")
    with pytest.raises(SystemExit, match="has no checkpoint"):
        main(["fit", "--run", str(stopped), "--resume"])
    with pytest.raises(SystemExit, match=r"--ckpt_path last: .* has no checkpoints/last\.ckpt"):
        main(["fit", "--run", str(stopped), "--ckpt_path", "last"])


def test_ckpt_path_last_is_the_runs_own(stopped, whole):
    shutil.copy(stopped / "checkpoints" / "previous.ckpt", stopped / "checkpoints" / "last.ckpt")
    main(["fit", "--run", str(stopped), "--ckpt_path", "last"])
    assert_equal_runs(whole, stopped)


def test_to_resume_a_run_that_has_ended_changes_nothing_and_says_so(whole, tmp_path, capsys):
    run = shutil.copytree(whole, tmp_path / "ended")
    main(["test", "--run", str(run)])
    before = contents(run)
    main(["fit", "--run", str(run), "--resume"])
    assert "has ended already; raise trainer.max_steps" in capsys.readouterr().out
    after = contents(run)
    assert {path: after[path] for path in before} == before
    assert {path.parts[0] for path in after.keys() - before.keys()} <= {"tensorboard"}


def test_a_run_that_was_killed_before_it_was_written_is_written_by_resume(stopped, whole):
    shutil.rmtree(stopped / "adapters")
    main(["fit", "--run", str(stopped), "--resume"])
    assert_equal_runs(whole, stopped)


@pytest.mark.parametrize("how", [["--resume"], []])
def test_a_stopped_run_is_not_made_a_finished_one_without_training(stopped, how):
    before = contents(stopped)
    with pytest.raises(SystemExit, match=r"max_epochs is 0, and the fit of .* has not ended"):
        main(["fit", "--run", str(stopped), *how, "--trainer.max_epochs=0"])
    assert contents(stopped) == before


def test_the_time_of_a_run_is_that_of_all_its_parts(stopped):
    last = stopped / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    assert 0 < checkpoint["callbacks"]["RunWriter"]["seconds"] < 60
    checkpoint["callbacks"]["RunWriter"]["seconds"] = 6000.0
    torch.save(checkpoint, last)
    main(["fit", "--run", str(stopped), "--resume"])
    assert json.loads((stopped / MANIFEST).read_text())["facts"]["time"].startswith("100.")


# refused, or begun anew


@pytest.mark.parametrize(
    "mistake",
    ["--data.train=gone.jsonl", "--model.language.name=gone", "--model.learning_rat=1", "--ckpt_path=last"],
)
def test_a_refused_fit_changes_nothing(whole, tmp_path, mistake):
    run = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    before = contents(run)
    with pytest.raises(SystemExit):
        main(["fit", "--run", str(run), mistake])
    assert contents(run) == before


def test_a_run_is_one_run_in_its_own_directory(whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    before = contents(run)
    for word in (
        f"--trainer.default_root_dir={tmp_path / 'new'}",
        f'--trainer={{"default_root_dir": "{tmp_path}"}}',
    ):
        with pytest.raises(
            SystemExit, match=r"--run is .*run, but trainer.default_root_dir is .*give --config"
        ):
            main(["fit", "--run", str(run), word])
    with pytest.raises(SystemExit, match="--run is given 2 times"):
        main(["test", "--run", str(run), f"--run={whole}"])
    (config := tmp_path / "config.yaml").write_text((run / "config.yaml").read_text() + f"run: {run}\n")
    with pytest.raises(SystemExit, match=r"run: .* stands in a config; it is an option of the command line"):
        main(["test", "--config", str(config)])
    assert contents(run) == before
    main(["validate", "--run", str(run), f"--trainer.default_root_dir={tmp_path}/../{tmp_path.name}/run"])


def test_commands_to_paste_can_be_pasted(whole, tmp_path, capsys):
    run = shutil.copytree(whole, tmp_path / "a run")
    (run / MANIFEST).unlink()
    with pytest.raises(SystemExit, match=rf"`mmpeft fit --run '{run}' --resume`"):
        main(["test", "--run", str(run)])
    main(["fit", "--run", str(run), "--resume"])
    assert f"next: mmpeft test --run '{run}'" in capsys.readouterr().out


def test_a_new_fit_puts_aside_what_was_there(whole, tmp_path, capsys):
    run = shutil.copytree(whole, tmp_path / "run")
    main(["test", "--run", str(run)])
    before = contents(run)
    main(["fit", "--run", str(run), "--model.seed=1", "--trainer.max_steps=2"])
    assert f"is now in {run}/previous" in capsys.readouterr().out
    aside = contents(run / "previous")
    assert aside == before
    assert len([row for row in curves(run) if "train_loss" in row]) == 2
    assert not (run / "metrics.json").exists(), "of the finetune before"
    assert len(list((run / "tensorboard").glob("events*"))) == 1
    main(["ask", "what color is it?", "--run", str(run / "previous")])
    main(["fit", "--run", str(run), "--model.seed=2", "--trainer.max_steps=1"])
    assert contents(run / "previous") == before, "nothing that was trained is deleted"
    assert (run / "previous-2" / MANIFEST).exists()


def test_a_run_that_begins_from_its_own_directory_can_be_resumed(whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    stop = json.dumps([stopped_at(2, signal.SIGTERM)["callbacks"][0]])
    words = [f"--model.start_from={tmp_path}/../{tmp_path.name}/run", "--data.seed=5"]
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--run", str(run), *words, f"--trainer.callbacks={stop}"])
    assert stopped.value.code == 143
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert settings["model"]["start_from"] == str(run / "previous")
    main(["fit", "--run", str(run), "--resume", "--trainer.callbacks=null"])
    again = [
        "--model.start_from",
        str(whole),
        "--data.seed=5",
        f"--trainer.default_root_dir={tmp_path / 'again'}",
    ]
    main(["fit", "--config", str(whole / "config.yaml"), *again])
    assert_equal_runs(tmp_path / "again", run)


def test_two_processes_cannot_write_one_run(whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    with held(run):
        for command in ("fit", "test", "predict"):
            with pytest.raises(SystemExit, match="another mmpeft process is writing"):
                main([command, "--run", str(run)])


# asked


@pytest.mark.parametrize("command", ["test", "predict", "validate"])
def test_without_a_finished_run_nothing_is_tested(stopped, tmp_path, tiny_base, tiny_data, command):
    config = make(tmp_path / "other", tiny_base, tiny_data)
    with pytest.raises(SystemExit, match=r"is no run of mmpeft.*--untrained"):
        main([command, "--config", str(config)])
    assert not run_directory(config).exists()
    with pytest.raises(SystemExit, match=r"has not ended.*--resume"):
        main([command, "--run", str(stopped)])


def test_what_a_fit_would_begin_from_is_tested_on_demand(tmp_path, tiny_base, tiny_data):
    config = make(tmp_path, tiny_base, tiny_data)
    main(["test", "--config", str(config), "--untrained"])
    assert (run_directory(config) / "metrics.json").exists()


def test_the_config_of_a_run_stays_what_it_was_trained_with(whole, tmp_path, tiny_data):
    run = shutil.copytree(whole, tmp_path / "run")
    before = (run / "config.yaml").read_text()
    main(["test", "--run", str(run), "--data.packing.batch_size=40"])
    main(["predict", "--run", str(run), "--data.predict", str(tiny_data / "test.jsonl")])
    assert (run / "config.yaml").read_text() == before
    assert yaml.safe_load((run / "config_test.yaml").read_text())["data"]["packing"]["batch_size"] == 40
    assert (run / "config_predict.yaml").exists()


def test_the_cards_command_makes_the_run_again(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    card = (whole / "README.md").read_text()
    (command,) = [line for line in card.splitlines() if line.startswith("mmpeft fit")]
    main([*shlex.split(command)[1:], f"--trainer.default_root_dir={tmp_path / 'again'}"])
    assert_equal_runs(whole, tmp_path / "again")


@pytest.mark.parametrize(
    ("words", "folder"),
    [
        (["--data.limit=2"], "limit=2"),
        (["--test.answer_by=generate"], "answer_by=generate"),
        (["--test.max_new_tokens=3", "--data.limit=1"], "limit=1,max_new_tokens=3"),
        (["--trainer.limit_test_batches=1"], "limit_test_batches=1"),
        (["--model.language.dtype=bfloat16"], "language.dtype=bfloat16"),
        (["--data.packing.max_length=8"], "packing.max_length=8"),
    ],
)
def test_results_of_other_settings_never_take_the_place_of_the_runs_own(whole, tmp_path, words, folder):
    run = shutil.copytree(whole, tmp_path / "run")
    main(["test", "--run", str(run)])
    before = contents(run)
    main(["test", "--run", str(run), *words])
    after = contents(run)
    assert {path: after[path] for path in before} == before
    # typing keeps one of int | float and float | int for both, so that what was imported first decides how 1 is read
    written = {str(path.parent).removesuffix(".0") for path in after.keys() - before.keys()}
    assert written == {f"tests/{folder}"}


def test_what_cannot_change_the_answers_does_not_move_them(whole, tmp_path):
    """Nor does a setting that the version which trained the run did not have."""
    run = shutil.copytree(whole, tmp_path / "run")
    settings = yaml.safe_load((run / "config.yaml").read_text())
    del settings["data"]["style"], settings["trainer"]["precision"], settings["test"]["answer_by"]
    settings["trainer"]["limit_test_batches"] = 1
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    words = ["--model.learning_rate=1", "--trainer.max_epochs=3", "--data.val=null", "--data.seed=3"]
    main(["test", "--run", str(run), "--trainer.limit_test_batches=null", *words])
    assert json.loads((run / "metrics.json").read_text())["questions"] == 6
    assert not (run / "tests").exists()


def test_a_quick_try_of_a_test_writes_nothing(whole, tmp_path, tiny_data, capsys):
    run = shutil.copytree(whole, tmp_path / "run")
    before = contents(run)
    main(["test", "--run", str(run), "--trainer.fast_dev_run=true"])
    main(["predict", "--run", str(run), "--trainer.fast_dev_run=1", f"--data.predict={tiny_data}/test.jsonl"])
    assert contents(run) == before
    assert capsys.readouterr().out.count("no results were written") == 2


def test_answers_of_other_weights_are_not_gone_on_with(whole, tmp_path, dies_after_4_answers, capsys):
    run = shutil.copytree(whole, tmp_path / "run")
    words = ["test", "--run", str(run), f"--output={tmp_path / 'mine'}"]
    dies_after_4_answers(words)
    other = run / "checkpoints" / "previous.ckpt"
    main([*words, f"--ckpt_path={other}"])
    assert "are there already" not in capsys.readouterr().out
    main(["test", "--run", str(run), f"--ckpt_path={other}"])
    (folder,) = (run / "tests").iterdir()
    assert folder.name.startswith("ckpt_path=previous.ckpt-")
    assert not (run / "metrics.json").exists()


def test_two_data_files_of_one_name_have_results_of_their_own(whole, tmp_path, tiny_data):
    run = shutil.copytree(whole, tmp_path / "run")
    for name in "ab":
        shutil.copytree(tiny_data, tmp_path / name)
        main(["test", "--run", str(run), f"--data.test={tmp_path / name / 'test.jsonl'}"])
    folders = sorted(path.name for path in (run / "tests").iterdir())
    assert len(folders) == 2
    assert all(folder.startswith("test=test.jsonl-") for folder in folders)
    assert not (run / "metrics.json").exists()


def test_a_chosen_folder_gets_the_results(whole, tmp_path):
    main(["test", "--run", str(whole), "--data.limit=1", f"--output={tmp_path / 'mine'}"])
    assert (tmp_path / "mine" / "metrics.json").exists()


# no room


@contextmanager
def small_files():
    """Inside, no file may grow beyond 4 kB; also not the one that this suite's own output may go to."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_room_is_told_with_path_and_bytes_and_keeps_what_was_there(tmp_path):
    last = tmp_path / "checkpoints" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, last)
    larger = {"step": 2, "weights": torch.zeros(100_000)}
    with pytest.raises(RefusedError, match=r"last\.ckpt: no space left.* 0\.4 MB are needed.*MB are free"):
        with small_files():
            AtomicCheckpointIO().save_checkpoint(larger, last)
    assert torch.load(last, weights_only=True) == {"step": 1}
    assert os.listdir(last.parent) == ["last.ckpt"]
    assert newest_whole_checkpoint(tmp_path) == last
    with pytest.raises(RefusedError, match=r"text\.md: no space left"):
        with small_files():
            write_whole(tmp_path / "text.md", "x" * 5000)
    assert not list(tmp_path.glob("*text.md"))
    save_tensors({"kept": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(RefusedError, match=r"x\.safetensors: no space left"):
        with small_files():
            save_tensors({"lost": torch.ones(2000)}, tmp_path / "x.safetensors")
    assert load_file(tmp_path / "x.safetensors").keys() == {"kept"}
    assert len(list(tmp_path.glob("*x.safetensors"))) == 1


def test_another_reason_than_room_is_not_told_as_that(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: Permission denied (os error 13)")

    monkeypatch.setattr("safetensors.torch.save_file", refuse)
    with pytest.raises(SafetensorError, match="Permission denied"):
        save_tensors({"lost": torch.ones(2)}, tmp_path / "x.safetensors")


def test_a_disk_without_room_is_told_before_the_first_step(tmp_path, tiny_base, tiny_data, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(SystemExit, match=r"last\.ckpt: no space left.*0\.0 MB are free"):
        fit(make(tmp_path, tiny_base, tiny_data))
    assert not list(tmp_path.rglob("*.ckpt"))


def test_checkpoints_have_ordinary_permissions(whole, tmp_path):
    (plain := tmp_path / "plain").touch()
    for path in (whole / "checkpoints").iterdir():
        assert path.stat().st_mode == plain.stat().st_mode

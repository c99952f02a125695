"""Who may write a run directory, what a refused fit leaves alone, and where an earlier one goes."""

import json
import shutil
import signal

import pytest
import yaml

from mmpeft.cli import main
from mmpeft.runs.manifest import MANIFEST
from mmpeft.runs.occupancy import held
from tests.training.run_life import assert_equal_runs, contents, curves, fit, make, stopped_at


def test_stage_2_before_stage_1_is_told_before_anything_is_loaded(
    tmp_path, tiny_base, tiny_data, monkeypatch
):
    monkeypatch.setattr("mmpeft.training.start.build_model", None)
    config = make(tmp_path, tiny_base, tiny_data)
    with pytest.raises(
        SystemExit, match=r"model\.start_from: .*gone is no run of mmpeft.*set model\.start_from to null"
    ):
        fit(config, f"--model.start_from={tmp_path / 'gone'}")


@pytest.mark.parametrize(
    "mistake",
    ["--data.train=gone.jsonl", "--model.language.name=./gone", "--model.learning_rat=1", "--ckpt_path=last"],
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

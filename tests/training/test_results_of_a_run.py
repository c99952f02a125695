"""A run that is asked: never one that is not finished, and results of other settings never in place of its own."""

import json
import shlex
import shutil

import pytest
import yaml

from mmpeft.cli import main
from tests.tiny import run_directory
from tests.training.run_life import assert_equal_runs, contents, make


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

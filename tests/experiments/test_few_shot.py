"""`mmpeft few-shot`: a finetune per seed, and how far they are apart."""

import json
import shutil
import statistics

import pytest

from mmpeft.cli import main
from mmpeft.experiments import steps
from mmpeft.experiments.few_shot import quartiles
from tests.tiny import make_config


@pytest.fixture
def config(tiny_base, tiny_data, choice_data, tmp_path):
    data = {split: str(choice_data / f"{split}_choices.jsonl") for split in ("train", "val", "test")}
    return make_config(
        tmp_path / "tfew.yaml",
        tiny_base,
        tiny_data,
        model={"adapter": {"class_path": "mmpeft.adapters.IA3Config"}},
        data=data | {"image_root": str(tiny_data), "packing": {"batch_size": 4}},
    )


def test_every_seed_is_trained_tested_and_in_the_table(config, tmp_path, capsys):
    main(
        ["few-shot", f"[{config}]", "--shots=1", "--seeds=3", "--max_steps=2", f"--output={tmp_path / 'out'}"]
    )
    (row,) = json.loads((tmp_path / "out" / "few_shot.json").read_text())
    (directory,) = (path for path in (tmp_path / "out").iterdir() if path.is_dir())
    metrics = json.loads((directory / "seeds" / "metrics.json").read_text())
    assert row["accuracies"] == [metrics[f"accuracy/seed{seed}"] for seed in range(3)]
    assert row["untrained"] == json.loads((directory / "untrained" / "metrics.json").read_text())["accuracy"]
    told = capsys.readouterr().out
    assert "3 seeds: accuracy" in " ".join(told.split())
    assert f"{statistics.median(row['accuracies']):.3f}" in told
    examples = (directory / "seeds" / "config.yaml").read_text()
    assert "shots: 1" in examples


def test_a_second_start_runs_nothing_anew_and_other_settings_are_refused(config, tmp_path, monkeypatch):
    words = ["few-shot", f"[{config}]", "--shots=1", "--seeds=1", f"--output={tmp_path / 'out'}"]
    main([*words, "--max_steps=2"])
    before = (tmp_path / "out" / "few_shot.json").read_text()
    ran, run_here = [], steps.run_here
    monkeypatch.setattr(steps, "run_here", lambda words: ran.append(words[0]) or run_here(words))
    main([*words, "--max_steps=2"])
    assert ran == []
    assert (tmp_path / "out" / "few_shot.json").read_text() == before
    with pytest.raises(SystemExit, match=r"trainer\.max_steps: trained with 2, found 3\nDelete it"):
        main([*words, "--max_steps=3"])
    assert ran == []


def test_answers_that_are_no_classes_are_refused_before_the_training(config, tiny_data, tmp_path):
    written = config.read_text().replace("test_choices.jsonl", "test.jsonl")
    config.write_text(written)
    with pytest.raises(SystemExit, match="are no classes"):
        main(["few-shot", f"[{config}]", "--shots=1", "--seeds=1", f"--output={tmp_path / 'out'}"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--shots=3"], "2 examples have the answer 'blue'"),
        (["--shots=0"], "data.shots is 0"),
        (["--seeds=0"], "--seeds is 0; it must be at least 1"),
    ],
)
def test_shots_that_are_not_there_are_refused_before_anything_is_answered(
    config, tmp_path, monkeypatch, words, told
):
    monkeypatch.setattr(steps, "run_here", lambda words: pytest.fail(f"{words[0]} ran"))
    with pytest.raises(SystemExit, match=told):
        main(["few-shot", f"[{config}]", "--shots=1", "--seeds=1", f"--output={tmp_path}", *words])


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "holds nothing; wanted settings"),
        ("data: {}", "has no model.adapter"),
        ("model:\ndata: {}", "has no model.adapter"),
        ("model: 3", "has model: 3; wanted settings below it"),
        ("model: [", "not valid YAML"),
    ],
)
@pytest.mark.parametrize("command", ["few-shot", "compare-methods", "sweep"])
def test_what_is_no_config_is_told(tmp_path, command, content, told):
    path = tmp_path / "broken.yaml"
    path.write_text(content)
    words = {"few-shot": [f"[{path}]"]}.get(command, ["--config", str(path)])
    told = {"compare-methods": "has no data.test", "sweep": "model.adapter"}.get(
        command if "adapter" in told else "", told
    )
    with pytest.raises(SystemExit, match=told):
        main([command, *words, f"--output={tmp_path / 'out'}"])


def test_two_configs_of_one_folder_are_refused_before_either_is_trained(config, tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "run_here", lambda words: pytest.fail(f"{words[0]} ran"))
    paths = [tmp_path / number / "x" / "tfew.yaml" for number in "12"]
    for path in paths:
        path.parent.mkdir(parents=True)
        path.write_text(config.read_text())
    given = f"[{paths[0]},{paths[1]}]"
    with pytest.raises(SystemExit, match=r"would both go into .*x_tfew; rename one"):
        main(["few-shot", given, "--shots=1", "--seeds=1", f"--output={tmp_path}"])


@pytest.mark.slow
def test_the_untrained_model_is_asked_as_the_trained_ones_are(config, tmp_path):
    """Settings of the test, too, decide about what was answered before."""
    words = ["few-shot", f"[{config}]", "--shots=1", "--seeds=1", "--max_steps=1", f"--output={tmp_path}"]
    main(words)
    (untrained,) = tmp_path.glob("*/untrained/predictions.jsonl")
    assert "scores" in untrained.read_text()
    config.write_text(config.read_text() + "test: {answer_by: generate}\n")
    shutil.rmtree(untrained.parents[1] / "seeds")
    main(words)
    assert "scores" not in untrained.read_text()


def test_quartiles():
    assert quartiles([0.5]) == (0.5, 0.5, 0.5)
    assert quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == (2.0, 3.0, 4.0)

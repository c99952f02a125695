"""`mmpeft few-shot`: a finetune per seed, and how far they are apart."""

import json
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


def test_quartiles():
    assert quartiles([0.5]) == (0.5, 0.5, 0.5)
    assert quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == (2.0, 3.0, 4.0)

"""Several finetunes in one run: each ends as it would have alone."""

import csv
import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

import mmpeft
from mmpeft.cli import main
from mmpeft.errors import RefusedError
from mmpeft.inference import adapter_check
from mmpeft.training.optim import PATIENCE
from tests.tiny import COLOURS, make_config, run_directory, write_jsonl

CLOSE = {"rtol": 1e-4, "atol": 2e-5}
"""Rows are padded to the widest of the joint batch: other shapes, other rounding, some steps of AdamW."""
LORA = {"class_path": "mmpeft.adapters.LoraConfig", "init_args": {"rank": 4, "alpha": 8, "dropout": 0.3}}
DORA = {"class_path": "mmpeft.adapters.DoraConfig", "init_args": {"rank": 2, "dropout": 0.3}}
IA3 = {"class_path": "mmpeft.adapters.IA3Config"}
PROMPT = {"class_path": "mmpeft.adapters.PromptConfig", "init_args": {"num_virtual_tokens": 3}}


NAMES = ("colours", "few", "three", "ranked")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_data):
    """A folder with data files of 24, 9 and 3 questions, and of the colour questions with four choices each."""
    folder = tmp_path_factory.mktemp("joint")
    rows = [json.loads(line) for line in (tiny_data / "train.jsonl").read_text().splitlines()]
    for name, some in (("colours", rows), ("few", rows[:9]), ("three", rows[5:8])):
        write_jsonl(folder / f"{name}.jsonl", some)
    coloured = [row for row in rows if row["conversations"][1]["value"] in COLOURS]
    write_jsonl(folder / "ranked.jsonl", [row | {"choices": sorted(COLOURS)} for row in coloured])
    return folder


@pytest.fixture(scope="module")
def finetunes(folder):
    return {
        "colours": {"adapter": LORA, "train": str(folder / "colours.jsonl")},
        "few": {
            "adapter": IA3,
            "train": [str(folder / "few.jsonl")],
            "learning_rate": 3e-2,
            "schedule": "linear",
        },
        "three": {
            "adapter": PROMPT,
            "train": str(folder / "three.jsonl"),
            "projector_learning_rate": 2e-3,
            "max_steps": 5,
        },
        "ranked": {  # by T-Few's losses
            "adapter": IA3,
            "train": str(folder / "ranked.jsonl"),
            "choice_losses": {"unlikelihood": 0.5, "length_normalised": 1.0},
        },
    }


def run_together(path, tiny_base, tiny_data, finetunes, **trainer):
    config = make_config(
        path / "config.yaml",
        tiny_base,
        tiny_data,
        model={"adapter": None, "adapters": finetunes},
        trainer={"log_every_n_steps": 1, "val_check_interval": None} | trainer,
    )
    settings = yaml.safe_load(config.read_text())
    settings["data"]["image_root"] = str(tiny_data)
    config.write_text(yaml.safe_dump(settings))
    return config


def run_alone(path, tiny_base, tiny_data, name, own, **trainer):
    own = dict(own)
    data = {"train": own.pop("train"), "image_root": str(tiny_data), "val": None, "test": None}
    trainer = (
        {"max_steps": own.pop("max_steps")} if "max_steps" in own and "max_steps" in trainer else trainer
    )
    config = make_config(
        path / name / "config.yaml",
        tiny_base,
        tiny_data,
        model=own | {"adapter_name": name},
        data=data,
        trainer={"log_every_n_steps": 1} | trainer,
    )
    main(["fit", "--config", str(config)])
    return run_directory(config)


def losses(run, curve="train_loss"):
    with (run / "metrics.csv").open() as file:
        return [float(row[curve]) for row in csv.DictReader(file) if row.get(curve) not in (None, "", "nan")]


def trained(run, name):
    adapter = load_file(run / "adapters" / name / "adapter_model.safetensors")
    return adapter | load_file(run / "adapters" / name / "projector.safetensors")


@pytest.fixture(
    scope="module", params=[{"max_steps": 12}, {"max_steps": -1, "max_epochs": 2}], ids=["steps", "epochs"]
)
def trainer(request):
    return request.param


@pytest.fixture(scope="module")
def together(trainer, tmp_path_factory, tiny_base, tiny_data, finetunes):
    config = run_together(tmp_path_factory.mktemp("together"), tiny_base, tiny_data, finetunes, **trainer)
    main(["fit", "--config", str(config)])
    return config


@pytest.mark.parametrize("name", list(NAMES))
def test_a_joint_run_is_each_finetune_alone(
    together, trainer, name, tmp_path, tiny_base, tiny_data, finetunes
):
    """Other methods, data of other lengths, learning rates and schedules; one leaves after five steps, one drops
    features."""
    own = dict(finetunes[name])
    if "max_epochs" in trainer:
        own.pop("max_steps", None)  # two epochs of a single step each come first
    alone = run_alone(tmp_path, tiny_base, tiny_data, name, own, **trainer)
    want, got = trained(alone, name), trained(run_directory(together), name)
    assert want.keys() == got.keys()
    for key, tensor in want.items():
        torch.testing.assert_close(got[key], tensor, **CLOSE, msg=lambda m, key=key: f"{key}: {m}")
    curve = losses(run_directory(together), f"train_loss/{name}")
    assert curve == pytest.approx(losses(alone), rel=1e-4, abs=1e-5)


def test_each_drops_what_it_would_alone_however_wide_its_neighbours_rows(
    tmp_path, tiny_base, tiny_data, folder
):
    """Three finetunes with dropout; the questions of one are far longer, which pads the others' rows."""
    rows = [json.loads(line) for line in (folder / "few.jsonl").read_text().splitlines()]
    for row in rows:
        row["conversations"][0]["value"] += " and how many squares are there?" * 4
    write_jsonl(tmp_path / "long.jsonl", rows)
    finetunes = {
        "few": {"adapter": LORA, "train": str(folder / "few.jsonl")},
        "long": {"adapter": LORA, "train": str(tmp_path / "long.jsonl")},
        "three": {"adapter": DORA, "train": str(folder / "three.jsonl"), "max_steps": 4},
    }
    config = run_together(tmp_path / "all", tiny_base, tiny_data, finetunes, max_steps=6)
    main(["fit", "--config", str(config)])
    run = run_directory(config)
    for name, own in finetunes.items():
        alone = run_alone(tmp_path, tiny_base, tiny_data, name, own, max_steps=6)
        assert losses(run, f"train_loss/{name}") == pytest.approx(losses(alone), rel=1e-4, abs=1e-5)
        got = trained(run, name)
        for key, tensor in trained(alone, name).items():
            torch.testing.assert_close(got[key], tensor, **CLOSE, msg=lambda m, key=key: f"{key}: {m}")


def test_every_finetune_has_curves_of_its_own(together, trainer):
    with (run_directory(together) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    steps = {name: sum(row[f"train_loss/{name}"] not in ("", "nan") for row in rows) for name in NAMES}
    wanted = {"steps": [12, 12, 5, 12], "epochs": [8, 4, 2, 2]}[
        "epochs" if "max_epochs" in trainer else "steps"
    ]
    assert list(steps.values()) == wanted
    assert {f"val_exact_match/{name}" for name in steps} <= rows[0].keys()


def test_a_joint_run_serves_all_its_finetunes(together, tiny_data):
    vlm = mmpeft.load(run_directory(together))
    assert set(vlm.adapters) == set(NAMES)
    image = str(tiny_data / "images" / "red0.png")
    answers = vlm.ask([image] * len(NAMES), "what color is it?", adapter=list(NAMES))
    alone = [vlm.ask(image, "what color is it?", adapter=name) for name in NAMES]
    assert answers == alone


def test_a_joint_run_is_tested_finetune_by_finetune(together, capsys):
    main(["test", "--config", str(together)])
    metrics = json.loads((run_directory(together) / "metrics.json").read_text())
    rows = [
        json.loads(line) for line in (run_directory(together) / "predictions.jsonl").read_text().splitlines()
    ]
    for name in NAMES:
        right = [row["answer"] == row["truth"] for row in rows if row["adapter"] == name]
        assert metrics[f"questions/{name}"] == len(right) == 6, "all share data.test"
        assert metrics[f"exact_match/{name}"] == pytest.approx(sum(right) / 6)
    assert all(name in capsys.readouterr().out for name in NAMES[:1])


def test_one_finetune_that_is_damaged_leaves_the_others_answers(together, tmp_path, tiny_data, capsys):
    """Its adapter, or its projector: its own questions say why they have no answer."""
    run = shutil.copytree(run_directory(together), tmp_path / "run")
    words = [f"--run={run}", "--data.limit=2"]
    whole, damaged = tmp_path / "whole", tmp_path / "damaged"
    main(["test", *words, f"--output={whole}"])
    for name in ("colours/adapter_model", "three/projector"):
        (path := run / "adapters" / f"{name}.safetensors").write_bytes(path.read_bytes()[:-4] + bytes(4))
    capsys.readouterr()
    main(
        [
            "test",
            *words,
            f"--output={damaged}",
            "--forgetting",
            f"--test.held_text={tiny_data / 'text.jsonl'}",
        ]
    )
    assert "'colours' cannot be asked, the others can" in capsys.readouterr().err
    rows, before = (
        [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
        for folder in (damaged, whole)
    )
    for row, old in zip(rows, before, strict=True):
        if row["adapter"] in ("colours", "three"):
            assert row["answer"] is None
            assert f"adapters/{row['adapter']}/" in row["error"]
        else:
            assert row == old
    metrics = json.loads((damaged / "metrics.json").read_text())
    assert metrics["errors/colours"] == metrics["questions/colours"] == 2
    assert "errors/few" not in metrics
    assert "forgetting/kl/few" in metrics
    assert "forgetting/kl/colours" not in metrics
    with pytest.raises(SystemExit, match=r"adapters/three/projector\.safetensors is not the projector"):
        main(["validate", f"--run={run}"])
    with pytest.raises(SystemExit, match="'colours' cannot be asked, few, ranked, base can: "):
        main(["ask", "what color is it?", f"--run={run}"])


def test_one_finetune_that_fails_its_check_leaves_the_others_answers(together, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(run_directory(together), tmp_path / "run")

    def fails(model, name):
        if name == "colours":
            raise RefusedError("colours on this model changes nothing")

    monkeypatch.setattr(adapter_check, "_check", fails)
    monkeypatch.setattr(adapter_check, "kind_of", lambda entry: str(id(entry)))  # none is known
    main(["test", f"--run={run}", "--data.limit=2", f"--output={tmp_path / 'some'}"])
    assert "'colours' cannot be asked, the others can: colours on" in capsys.readouterr().err
    metrics = json.loads((tmp_path / "some" / "metrics.json").read_text())
    assert metrics["errors/colours"] == metrics["questions/colours"] == 2
    assert "errors/few" not in metrics
    with pytest.raises(SystemExit, match="colours on this model changes nothing"):
        main(["validate", f"--run={run}"])


def test_one_finetune_that_diverges_leaves_the_others_bits(tmp_path, tiny_base, tiny_data, finetunes, capsys):
    """Its weights are NaN after one step; its steps are skipped, told and then given up, and nobody else notices."""
    runs = {}
    for name, rate in (("healthy", 1e-2), ("sick", 1e37)):
        both = {"colours": finetunes["colours"], "other": finetunes["colours"] | {"learning_rate": rate}}
        config = run_together(tmp_path / name, tiny_base, tiny_data, both, max_steps=16)
        main(["fit", "--config", str(config)])
        runs[name] = run_directory(config)
    told = capsys.readouterr().out
    assert told.count("'other' has a gradient that is not finite") == PATIENCE
    assert "given up" in told
    want, got = (trained(runs[name], "colours") for name in ("healthy", "sick"))
    assert all(torch.equal(got[key], tensor) for key, tensor in want.items())


def test_a_resumed_joint_run_equals_the_uninterrupted_one(tmp_path, tiny_base, tiny_data, finetunes, trainer):
    every_step = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"every_n_train_steps": 1, "save_top_k": -1, "filename": "{step}"},
    }
    config = run_together(tmp_path, tiny_base, tiny_data, finetunes, **trainer, callbacks=[every_step])
    main(["fit", "--config", str(config)])
    run = run_directory(config)
    for step in (3, 4, 7):
        (path,) = run.rglob(f"step={step}.ckpt")
        again = tmp_path / f"from-{step}"
        resume = ["--trainer.default_root_dir", str(again), "--ckpt_path", str(path)]
        main(["fit", "--config", str(config), *resume])
        for name in finetunes:
            want, got = trained(run, name), trained(again, name)
            for key, tensor in want.items():
                assert torch.equal(got[key], tensor), (step, name, key)


def test_several_methods_of_giving_finetunes_at_once_are_refused(tmp_path, tiny_base, tiny_data, finetunes):
    config = run_together(tmp_path, tiny_base, tiny_data, finetunes)
    with pytest.raises(SystemExit, match=r"no model\.adapter beside them"):
        main(["fit", "--config", str(config), "--model.adapter", "mmpeft.adapters.IA3Config"])


def test_a_finetune_without_data_is_told_by_name(tmp_path, tiny_base, tiny_data, finetunes):
    config = run_together(tmp_path, tiny_base, tiny_data, finetunes | {"empty": {"adapter": IA3}})
    with pytest.raises(SystemExit, match="finetune 'empty' has no train data"):
        main(["fit", "--config", str(config), "--data.train", "null"])


def test_a_run_ends_when_its_last_finetune_has_left(tmp_path, tiny_base, tiny_data, finetunes):
    """Not only when trainer.max_steps is reached, which would never be."""
    both = {name: finetunes[name] | {"max_steps": steps} for name, steps in (("colours", 3), ("three", 5))}
    config = run_together(tmp_path, tiny_base, tiny_data, both, max_steps=1000)
    main(["fit", "--config", str(config)])
    with (run_directory(config) / "metrics.csv").open() as file:
        assert max(int(row["step"]) for row in csv.DictReader(file)) == 4


def test_going_on_alone_from_a_joint_run_takes_the_finetunes_own_projector(
    together, tmp_path, tiny_base, tiny_data, finetunes
):
    run = run_directory(together)
    own = finetunes["colours"] | {
        "learning_rate": 0.0,
        "projector_learning_rate": 0.0,
        "start_from": str(run),
    }
    alone = run_alone(tmp_path, tiny_base, tiny_data, "colours", own, max_steps=1)
    want, got = trained(run, "colours"), trained(alone, "colours")
    assert all(torch.equal(got[key], tensor) for key, tensor in want.items())


def test_testing_a_finetune_that_the_run_does_not_have_is_refused(together, capsys):
    """A fresh adapter would be measured, and its figures written over the run's."""
    with pytest.raises(SystemExit, match="has no adapter 'typo'"):
        main(
            [
                "test",
                "--config",
                str(together),
                "--model.adapters",
                "{typo: {adapter: mmpeft.adapters.IA3Config}}",
            ]
        )


def test_accumulation_is_refused(tmp_path, tiny_base, tiny_data, finetunes):
    config = run_together(tmp_path, tiny_base, tiny_data, finetunes, accumulate_grad_batches=2)
    with pytest.raises(SystemExit, match="accumulate_grad_batches to 1"):
        main(["fit", "--config", str(config)])

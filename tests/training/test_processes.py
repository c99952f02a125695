"""Two processes on one machine train, validate, test and predict as one does."""

import csv
import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mmpeft.cli import main
from mmpeft.runs.manifest import MANIFEST
from tests.tiny import COLOURS, make_config, run_directory, write_jsonl
from tests.training.of_two import run_on_two

CLOSE = {"rtol": 0, "atol": 1e-6}
"""Rows are padded otherwise and gradients added up in another order."""
LORA = {"class_path": "mmpeft.adapters.LoraConfig", "init_args": {"rank": 4, "alpha": 8, "dropout": 0.3}}
IA3 = {"class_path": "mmpeft.adapters.IA3Config"}
PROMPT = {"class_path": "mmpeft.adapters.PromptConfig", "init_args": {"num_virtual_tokens": 3}}
ROWS_OF_ONE = {"max_conversations": 1}
RATES = {"learning_rate": 1e-3, "projector_learning_rate": 1e-3}
EVERY_STEP = {
    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
    "init_args": {"every_n_train_steps": 1, "save_top_k": -1, "filename": "{step}"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_data, choice_data):
    """Data files: mixed of images and text, with choices of unequal length, and of one row alone."""
    folder = tmp_path_factory.mktemp("two")
    rows = [json.loads(line) for line in (tiny_data / "train.jsonl").read_text().splitlines()]
    texts = [
        {
            "id": f"text-{number}",
            "conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}],
        }
        for number, (q, a) in enumerate(
            [("is red a color?", "yes"), ("is two a color?", "no, it is a number")] * 3
        )
    ]
    write_jsonl(folder / "mixed.jsonl", [row for pair in zip(rows, texts * 4, strict=True) for row in pair])
    write_jsonl(folder / "one.jsonl", rows[:1])
    ranked = [json.loads(line) for line in (choice_data / "train.jsonl").read_text().splitlines()]
    for row in ranked:
        if "choices" in row:
            row["choices"] = [*sorted(COLOURS), "a colour that nobody has ever seen on a square"]
    write_jsonl(folder / "ranked.jsonl", ranked)
    write_jsonl(folder / "preferred.jsonl", [row for row in ranked if "choices" in row])
    return folder


@pytest.fixture(scope="module")
def settings(folder, tiny_data):
    """Name of a run -> its sections."""
    joint = {
        "mixed": {"adapter": LORA, "train": str(folder / "mixed.jsonl")},
        "ranked": {"adapter": IA3, "train": str(folder / "ranked.jsonl"), "learning_rate": 3e-3},
        "one": {"adapter": PROMPT, "train": str(folder / "one.jsonl"), "max_steps": 4},
    }
    data = {"image_root": str(tiny_data)}
    return {
        # rows of text alone stand beside rows with images, in one process or in the other
        "lora": {
            "model": {"adapter": LORA},
            "data": data | {"train": str(folder / "mixed.jsonl"), "packing": {"batch_size": 4} | ROWS_OF_ONE},
            "trainer": {"callbacks": [EVERY_STEP]},
        },
        # micro-batches and shares have other numbers of right tokens, wrong tokens and questions
        "choices": {
            "model": {"adapter": IA3},
            "data": data
            | {"train": str(folder / "ranked.jsonl"), "packing": {"batch_size": 5} | ROWS_OF_ONE},
            "trainer": {"accumulate_grad_batches": 2},
        },
        "joint": {"model": {"adapter": None, "adapters": joint}, "data": data, "trainer": {"max_steps": 6}},
        # pairs, and answers that are compared with a point of the whole batch
        "preferences": {
            "model": {
                "adapter": None,
                "adapters": {
                    name: {"adapter": LORA, "objective": name, "train": str(folder / "preferred.jsonl")}
                    for name in ("dpo", "orpo", "kto")
                },
            },
            "data": data | {"val": str(folder / "preferred.jsonl")},
            "trainer": {"max_steps": 5},
        },
        # one of the processes has no row in any step
        "one": {
            "model": {"adapter": LORA},
            "data": data | {"train": str(folder / "one.jsonl")},
            "trainer": {"max_steps": 3},
        },
        "projector": {"model": {"adapter": None}, "data": data | {"train": str(folder / "mixed.jsonl")}},
    }


def config_of(folder, base, data, name, sections, **trainer):
    own = {"max_steps": 8, "log_every_n_steps": 1} | sections.get("trainer", {}) | trainer
    made = {"model": RATES | sections["model"], "data": sections["data"], "trainer": own}
    return make_config(folder / name / "config.yaml", base, data, **made)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, folder, settings, tiny_base, tiny_data):
    """Name -> (run directory of one process, of two); and what the two printed."""
    root = tmp_path_factory.mktemp("runs")
    commands, found = [], {}
    for name, sections in settings.items():
        one = config_of(root / "one", tiny_base, tiny_data, name, sections)
        two = config_of(root / "two", tiny_base, tiny_data, name, sections, devices=2)
        main(["fit", "--config", str(one)])
        commands.append(["fit", "--config", str(two)])
        found[name] = run_directory(one), run_directory(two)
    one, two = found["lora"]
    for command in ("test", "predict"):
        words = [command, "--data.predict", str(tiny_data / "text.jsonl"), f"--output={{}}/{command}"]
        main([*(word.format(one) for word in words), f"--run={one}"])
        commands.append([*(word.format(two) for word in words), f"--run={two}"])
    commands += [["validate", "--run", str(two)], *_resumed(root, one)]
    told = run_on_two(root, commands)
    assert not [line for line in "".join(told).splitlines() if "ENDED" in line or "Traceback" in line], told
    return found | {"told": told, "root": root}


def _resumed(root, one):
    """The run of one process, gone on with by two from its third step."""
    path = next(one.rglob("step=3.ckpt"))
    yield [
        *("fit", "--config", str(one / "config.yaml"), "--trainer.devices=2", "--ckpt_path", str(path)),
        f"--trainer.default_root_dir={root / 'resumed'}",
    ]


def trained(run):
    return {
        f"{path.parent.name}/{path.name}/{key}": tensor
        for path in sorted(run.glob("adapters/*/*.safetensors")) + sorted(run.glob("*.safetensors"))
        for key, tensor in load_file(path).items()
    }


def assert_close(one, two):
    want, got = trained(one), trained(two)
    assert want.keys() == got.keys()
    assert want
    for key, tensor in want.items():
        torch.testing.assert_close(got[key], tensor, **CLOSE, msg=lambda text, key=key: f"{key}: {text}")


def curves(run):
    with (run / "metrics.csv").open() as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


@pytest.mark.parametrize("name", ["lora", "choices", "joint", "preferences", "one", "projector"])
def test_two_processes_train_what_one_does(runs, name):
    """Adapters and projectors, with what is dropped, per-finetune clipping and steps; and every curve."""
    one, two = runs[name]
    assert_close(one, two)
    for want, got in zip(curves(one), curves(two), strict=True):
        assert got == pytest.approx(want, rel=1e-5, abs=1e-6, nan_ok=True)


def test_dropout_trains(runs):
    """Without it what two processes drop would be no question."""
    one, _ = runs["lora"]
    assert (
        yaml.safe_load((one / "config.yaml").read_text())["model"]["adapter"]["init_args"]["dropout"] == 0.3
    )


@pytest.mark.parametrize(("command", "file"), [("test", "predictions.jsonl"), ("predict", "answers.jsonl")])
def test_questions_are_divided_and_their_answers_joined_in_order(runs, command, file):
    one, two = runs["lora"]
    (want, got) = ((run / command / file).read_text() for run in (one, two))
    ids = [json.loads(line)["id"] for line in got.splitlines()]
    assert len(ids) == len(set(ids)) > 1
    assert got == want
    assert not list(two.rglob("*.partial*"))


def test_each_image_is_encoded_by_one_process(runs):
    one, two = (
        {path.name: path.read_bytes() for path in run.parent.rglob("features/**/*.safetensors")}
        for run in runs["lora"]
    )
    assert one
    assert two == one


def test_the_first_process_alone_tells(runs):
    first, second = runs["told"]
    assert "next: mmpeft test" in first
    assert not second


def test_two_processes_go_on_with_a_run_of_one_as_one_would(runs):
    assert_close(runs["lora"][0], runs["root"] / "resumed")


def test_one_process_goes_on_with_a_run_of_two(runs, tmp_path):
    one, two = runs["lora"]
    path = next(two.rglob("step=5.ckpt"))
    (run := shutil.copytree(two, tmp_path / "run") / MANIFEST).unlink()
    words = [
        f"--trainer.default_root_dir={tmp_path / 'other'}",
        "--ckpt_path",
        str(path),
        "--trainer.devices=1",
    ]
    main(["fit", "--config", str(two / "config.yaml"), *words])
    assert_close(one, tmp_path / "other")
    assert run.parent.exists()

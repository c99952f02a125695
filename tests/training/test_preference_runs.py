"""Runs that learn from preferences: what is preferred becomes likelier, joint as alone, resumed as uninterrupted."""

import csv
import json
import math

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mmpeft.cli import main
from tests.tiny import COLOURS, make_config, run_directory, write_jsonl

CLOSE = {"rtol": 1e-4, "atol": 2e-5}
"""Rows are padded to the widest of the joint batch."""
STEPS = 12
LORA = {"class_path": "mmpeft.adapters.LoraConfig", "init_args": {"rank": 4, "alpha": 8, "dropout": 0.1}}
REFERRED = {"dpo": math.log(2), "ipo": 25.0, "kto": 0.5}
"""Objective -> its loss where policy and reference are one."""
ALL = (*REFERRED, "orpo", "simpo")
EVERY_SECOND = {
    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
    "init_args": {"every_n_train_steps": 2, "save_top_k": -1, "filename": "{step}"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_data):
    """Pairs of colours, and labelled ones, of the training images."""
    folder = tmp_path_factory.mktemp("preferences")
    images = [path for path in sorted((tiny_data / "images").glob("*.png")) if not path.stem.endswith("2")]
    pairs, labels = [], []
    for path in images:
        colour, others = path.stem[:-1], [own for own in COLOURS if own != path.stem[:-1]]
        asked = {"image": f"images/{path.name}", "question": "what color is it?"}
        pairs += [asked | {"chosen": colour, "rejected": other} for other in others[:2]]
        labels += [
            asked | {"answer": colour, "kto_tag": True},
            asked | {"answer": others[0], "kto_tag": False},
        ]
    write_jsonl(folder / "pairs.jsonl", pairs)
    write_jsonl(folder / "labels.jsonl", labels)
    return folder


def data_of(folder, name):
    return str(folder / ("labels.jsonl" if name == "kto" else "pairs.jsonl"))


def run(path, tiny_base, tiny_data, model, data=None, words=(), **trainer):
    own = {"max_steps": STEPS, "log_every_n_steps": 1} | trainer
    own_data = {"image_root": str(tiny_data), "val": None, "test": None} | (data or {})
    config = make_config(path / "config.yaml", tiny_base, tiny_data, model=model, data=own_data, trainer=own)
    main(["fit", "--config", str(config), *words])
    return run_directory(config)


@pytest.fixture(scope="module")
def joint(tmp_path_factory, tiny_base, tiny_data, folder):
    """All objectives side by side, and one finetune that learns answers."""
    own = {
        name: {"adapter": LORA, "objective": name, **dict.fromkeys(("train", "val"), data_of(folder, name))}
        for name in ALL
    }
    own["plain"] = {"adapter": LORA, "train": str(tiny_data / "train.jsonl")}
    model = {"adapter": None, "adapters": own}
    path = tmp_path_factory.mktemp("joint")
    return run(path, tiny_base, tiny_data, model, check_val_every_n_epoch=2)


def curve(run, name):
    with (run / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name) not in (None, "", "nan")]


def trained(run, name):
    folder = run / "adapters" / name
    return load_file(folder / "adapter_model.safetensors") | load_file(folder / "projector.safetensors")


@pytest.mark.parametrize("name", ALL)
def test_what_is_preferred_becomes_likelier(joint, name):
    accuracy, margin = (curve(joint, f"train_reward_{what}/{name}") for what in ("accuracy", "margin"))
    assert len(accuracy) == STEPS
    assert sum(accuracy[-3:]) / 3 > max(0.9, accuracy[0])
    assert margin[-1] > margin[0]
    assert curve(joint, f"val_reward_accuracy/{name}")[-1] > 0.9
    assert curve(joint, f"val_reward_margin/{name}")[-1] > 0
    assert curve(joint, f"val_loss/{name}")[-1] < curve(joint, f"val_loss/{name}")[0]


@pytest.mark.parametrize("name", REFERRED)
def test_a_fresh_finetune_begins_as_its_reference(joint, name):
    assert curve(joint, f"train_loss/{name}")[0] == pytest.approx(REFERRED[name], rel=1e-4)
    assert curve(joint, f"train_reward_margin/{name}")[0] == pytest.approx(0, abs=1e-4)


def test_a_finetune_beside_them_has_no_rewards(joint):
    assert curve(joint, "train_loss/plain")
    assert not curve(joint, "train_reward_accuracy/plain")


def test_a_finetune_ends_beside_others_as_it_would_alone(joint, tmp_path, tiny_base, tiny_data, folder):
    """With the reference and the point of its own batches."""
    name = "kto"
    model = {"adapter": LORA, "adapter_name": name, "objective": name}
    alone = run(tmp_path, tiny_base, tiny_data, model, {"train": data_of(folder, name)})
    found = trained(joint, name)
    for key, tensor in trained(alone, name).items():
        torch.testing.assert_close(found[key], tensor, **CLOSE, msg=lambda text, key=key: f"{key}: {text}")
    for what in ("loss", "reward_margin", "reward_accuracy"):
        assert curve(joint, f"train_{what}/{name}") == pytest.approx(
            curve(alone, f"train_{what}"), rel=1e-3, abs=1e-4
        )


@pytest.fixture(scope="module")
def going_on(tmp_path_factory, tiny_base, tiny_data, tiny_run, folder):
    """A run that begins as the adapter of another."""
    model = {
        "objective": "dpo",
        "start_from": str(tiny_run),
        "preferences": {"reference": "default", "beta": 0.3},
    }
    path = tmp_path_factory.mktemp("going_on")
    data = {"train": data_of(folder, "dpo"), "test": data_of(folder, "dpo")}
    return run(path, tiny_base, tiny_data, model, data, max_steps=6, callbacks=[EVERY_SECOND])


def test_a_finetune_that_goes_on_is_compared_with_what_it_was(going_on):
    """Adapter and projector train, the reference does not."""
    losses = curve(going_on, "train_loss")
    assert losses[0] == pytest.approx(math.log(2), rel=1e-5)
    assert losses[-1] < 0.9 * losses[0]
    assert curve(going_on, "train_reward_margin")[-1] > 0


def test_a_resumed_run_has_the_same_reference(going_on, tmp_path):
    path = next(going_on.rglob("step=2.ckpt"))
    words = [f"--trainer.default_root_dir={tmp_path / 'run'}", "--ckpt_path", str(path)]
    main(["fit", "--config", str(going_on / "config.yaml"), *words])
    found = trained(tmp_path / "run", "default")
    assert all(torch.equal(found[key], tensor) for key, tensor in trained(going_on, "default").items())
    assert curve(tmp_path / "run", "train_loss") == curve(going_on, "train_loss")[2:]


def test_another_objective_than_the_checkpoints_is_refused(going_on, tmp_path):
    path = next(going_on.rglob("step=2.ckpt"))
    words = [f"--trainer.default_root_dir={tmp_path}", "--ckpt_path", str(path)]
    with pytest.raises(SystemExit, match=r"beta: the checkpoint has 0\.3, found 0\.5"):
        main(["fit", "--config", str(going_on / "config.yaml"), *words, "--model.preferences.beta=0.5"])


def test_held_out_pairs_are_ranked_with_an_interval(going_on, tiny_base, capsys):
    main(["test", "--run", str(going_on)])
    metrics = json.loads((going_on / "metrics.json").read_text())
    assert metrics["ci95_low/accuracy"] <= metrics["accuracy"] <= metrics["ci95_high/accuracy"]
    assert json.loads((going_on / "mmpeft.json").read_text())["choices"] == {}, "asked later, it writes"
    with pytest.raises(SystemExit, match="'default' is compared with what it began from"):
        main(["validate", "--run", str(going_on), f"--data.val={_train_of(going_on)}"])


def _train_of(run):
    return yaml.safe_load((run / "config.yaml").read_text())["data"]["train"]


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("dpo", "labels", "kto_tag is false: the answer is a wrong one"),
        (
            "simpo",
            "plain",
            'has one answer, of which nobody says what it is preferred to: give rows a "rejected"',
        ),
        ("kto", "plain", 'give rows a "label" of true or false'),
    ],
)
def test_rows_that_do_not_say_what_is_preferred_are_refused(
    tmp_path, tiny_base, tiny_data, folder, name, rows, message
):
    train = str(tiny_data / "train.jsonl") if rows == "plain" else str(folder / f"{rows}.jsonl")
    with pytest.raises(SystemExit, match=message):
        run(tmp_path, tiny_base, tiny_data, {"objective": name}, {"train": train})
    assert not (tmp_path / "features").exists(), "before images are encoded"


def test_kto_in_batches_of_one_is_refused(tmp_path, tiny_base, tiny_data, folder):
    data = {"train": data_of(folder, "kto"), "packing": {"batch_size": 1}}
    with pytest.raises(SystemExit, match=r"batch_size is 1, but kto compares .*at least 2"):
        run(tmp_path, tiny_base, tiny_data, {"objective": "kto"}, data)

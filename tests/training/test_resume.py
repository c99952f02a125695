"""Checkpoints: what they hold, whom they fit, and that a resumed run equals one that was never interrupted."""

import csv
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from mmpeft.cli import main
from mmpeft.training.checkpoint_files import AtomicCheckpointIO
from tests.tiny import make_config, make_data, run_directory

STEPS = 8
"""Two epochs of 24 conversations in batches of 6."""
LORA = {"rank": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"], "dropout": 0.2}


@pytest.fixture(scope="module", params=[{"max_steps": STEPS}, {"max_epochs": 2}], ids=["steps", "epochs"])
def config(request, tmp_path_factory, tiny_base, tiny_data):
    """A run that keeps the checkpoint of every step. Dropout must go on with the next batch as well."""
    folder = tmp_path_factory.mktemp("resume")
    every_step = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"every_n_train_steps": 1, "save_top_k": -1, "filename": "{step}"},
    }
    return make_config(
        folder / "config.yaml",
        tiny_base,
        tiny_data,
        model={"adapter": {"class_path": "mmpeft.adapters.LoraConfig", "init_args": LORA}},
        trainer={"max_steps": -1, "log_every_n_steps": 1, "callbacks": [every_step]} | request.param,
    )


@pytest.fixture(scope="module")
def uninterrupted(config):
    main(["fit", "--config", str(config)])
    return run_directory(config)


def checkpoint_of(run, step):
    (path,) = run.rglob(f"step={step}.ckpt")
    return path


def trained(run):
    adapter = load_file(run / "adapters" / "default" / "adapter_model.safetensors")
    return adapter | load_file(run / "adapters" / "default" / "projector.safetensors")


def curve(run, column, first=0):
    with (run / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get(column) and int(row["step"]) >= first]
    return {row["step"]: row[column] for row in rows}


def test_the_config_is_what_these_tests_rely_on(uninterrupted):
    assert len(curve(uninterrupted, "train_loss")) == STEPS
    assert len(curve(uninterrupted, "val_loss")) == 2


@pytest.mark.parametrize("step", [1, 3, 4, 6])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(config, uninterrupted, tmp_path, step):
    """In the middle of the first epoch, at its very end (4), and in the second."""
    path = checkpoint_of(uninterrupted, step)
    main(
        [
            "fit",
            "--config",
            str(config),
            "--trainer.default_root_dir",
            str(tmp_path),
            "--ckpt_path",
            str(path),
        ]
    )
    expected, found = trained(uninterrupted), trained(tmp_path)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    for column in ("train_loss", "gradient_norm"):
        assert curve(tmp_path, column) == curve(uninterrupted, column, first=step)
    assert curve(tmp_path, "val_loss").items() >= curve(uninterrupted, "val_loss", first=step).items()
    one, other = (
        torch.load(next(run.rglob(f"step={STEPS}.ckpt")), weights_only=True)
        for run in (uninterrupted, tmp_path)
    )
    for state, twin in zip(*(c["optimizer_states"][0]["state"].values() for c in (one, other)), strict=True):
        assert all(torch.equal(state[key], twin[key]) for key in state)


def test_a_checkpoint_holds_what_trains_and_nothing_of_the_base(uninterrupted):
    path = checkpoint_of(uninterrupted, STEPS)
    checkpoint = torch.load(path, weights_only=True)
    names = {
        f"model.bank.stacks.model/layers/{layer}/self_attn/{site}/lora.lora_{part}"
        for layer in range(2)
        for site in ("q_proj", "v_proj")
        for part in "AB"
    }
    assert checkpoint["state_dict"].keys() == names | {"model.projector.weight", "model.projector.bias"}
    assert path.stat().st_size < 200_000, "the base alone has 470 kB"


def test_a_checkpoint_of_another_rank_is_refused_field_by_field(config, uninterrupted, tmp_path):
    arguments = ["--trainer.default_root_dir", str(tmp_path), "--model.adapter.init_args.rank", "8"]
    with pytest.raises(SystemExit) as refused:
        main(
            ["fit", "--config", str(config), *arguments, "--ckpt_path", str(checkpoint_of(uninterrupted, 3))]
        )
    message = str(refused.value)
    assert "does not fit this run" in message
    assert "q_proj/lora.lora_A: the checkpoint has [1, 4, 64], found [1, 8, 64]" in message
    assert "projector" not in message, "what fits is not told"


def test_a_checkpoint_of_other_targets_is_refused(config, uninterrupted, tmp_path):
    arguments = [
        "--trainer.default_root_dir",
        str(tmp_path),
        "--model.adapter.init_args.target_modules",
        "[q_proj]",
    ]
    with pytest.raises(SystemExit, match=r"v_proj/lora.lora_A: the checkpoint has \[1, 4, 64\], found None"):
        main(
            ["fit", "--config", str(config), *arguments, "--ckpt_path", str(checkpoint_of(uninterrupted, 3))]
        )


def test_another_learning_rate_than_the_checkpoints_is_refused(config, uninterrupted, tmp_path):
    """The optimiser's state would bring the old one back whatever the command line says."""
    arguments = ["--trainer.default_root_dir", str(tmp_path), "--model.learning_rate", "0.5"]
    with pytest.raises(SystemExit, match=r"learning_rate: the checkpoint has 0.01, found 0.5"):
        main(
            ["fit", "--config", str(config), *arguments, "--ckpt_path", str(checkpoint_of(uninterrupted, 3))]
        )


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "--trainer.accumulate_grad_batches=2",
            "trainer.accumulate_grad_batches: the checkpoint has 1, found 2",
        ),
        ("--trainer.gradient_clip_val=3", r"trainer.gradient_clip_val: the checkpoint has 1.0, found 3"),
        ("--trainer.limit_train_batches=2", "trainer.limit_train_batches: the checkpoint has"),
        (
            "--trainer.precision=bf16-true",
            "trainer.precision: the checkpoint has '32-true', found 'bf16-true'",
        ),
        ("--model.language.dtype=bfloat16", "language.dtype: the checkpoint has 'float32', found 'bfloat16'"),
        ("--model.language.attention=sdpa", "language.attention: the checkpoint has 'auto', found 'sdpa'"),
    ],
)
def test_settings_that_the_first_steps_did_not_have_are_refused(
    config, uninterrupted, tmp_path, setting, message
):
    """The config that is written is of the whole run."""
    words = ["--trainer.default_root_dir", str(tmp_path), "--ckpt_path", str(checkpoint_of(uninterrupted, 3))]
    with pytest.raises(SystemExit, match=message):
        main(["fit", "--config", str(config), *words, setting])


def test_another_run_to_begin_from_is_refused(config, uninterrupted, tiny_run, tmp_path):
    words = ["--trainer.default_root_dir", str(tmp_path), "--ckpt_path", str(checkpoint_of(uninterrupted, 3))]
    with pytest.raises(SystemExit, match=r"begun_from\.weights: the checkpoint has None"):
        main(
            [
                "fit",
                "--config",
                str(config),
                *words,
                f"--model.start_from={tiny_run}",
                "--model.adapter_name=new",
            ]
        )


@pytest.mark.parametrize("what", ["row", "image"])
def test_data_that_was_edited_in_its_place_is_refused(tmp_path, tiny_base, what):
    data = make_data(tmp_path / "data")
    config = make_config(tmp_path / "config.yaml", tiny_base, data, trainer={"max_steps": 2})
    main(["fit", "--config", str(config)])
    path = data / "train.jsonl"
    if what == "row":
        path.write_text(path.read_text().replace('"yes"', '"no"', 1))
    else:
        shutil.copy(data / "images" / "red2.png", data / "images" / "red0.png")
    words = ["--run", str(run_directory(config)), "--resume", "--trainer.max_steps=4"]
    told = (
        r"records\.default: the checkpoint has learnt from other data than there is now in \S*train\.jsonl: "
    )
    with pytest.raises(
        SystemExit, match=rf"{told}a row, an image or their order has changed\nPut the data back"
    ):
        main(["fit", *words])
    with pytest.raises(SystemExit, match=rf"data\.seed: .*\n.*{told}.*\nResume with the run's own settings"):
        main(["fit", *words, "--data.seed=5"])


def test_a_checkpoint_without_the_newer_parts_is_resumed(config, uninterrupted, tmp_path):
    checkpoint = torch.load(checkpoint_of(uninterrupted, 3), weights_only=True)
    for part in ("begun_from", "language", "trainer", "records"):
        del checkpoint["mmpeft"]["belongs_to"][part]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    words = ["--trainer.default_root_dir", str(tmp_path / "run"), "--ckpt_path", str(tmp_path / "old.ckpt")]
    main(["fit", "--config", str(config), *words])
    assert all(
        torch.equal(own, trained(tmp_path / "run")[name]) for name, own in trained(uninterrupted).items()
    )


def test_a_checkpoints_weights_answer_whatever_else_was_set(config, uninterrupted, tmp_path):
    words = ["test", "--config", str(config), f"--ckpt_path={checkpoint_of(uninterrupted, 3)}"]
    main([*words, "--model.learning_rate=1", "--data.packing.batch_size=2", f"--output={tmp_path}"])
    assert (tmp_path / "predictions.jsonl").exists()


def test_a_strangers_checkpoint_is_refused(config, uninterrupted, tmp_path):
    path = tmp_path / "foreign.ckpt"
    checkpoint = torch.load(checkpoint_of(uninterrupted, 1), weights_only=True)
    del checkpoint["mmpeft"]
    torch.save(checkpoint, path)
    arguments = ["--trainer.default_root_dir", str(tmp_path), "--ckpt_path", str(path)]
    with pytest.raises(SystemExit, match="not written by mmpeft"):
        main(["fit", "--config", str(config), *arguments])


def test_a_checkpoint_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)

    def fail_half_way(checkpoint, file):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", fail_half_way)
    with pytest.raises(OSError, match="No space left"):
        AtomicCheckpointIO().save_checkpoint({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_another_scaling_than_the_checkpoints_is_refused(config, uninterrupted, tmp_path):
    """The tensors have the same shapes, but they mean something else."""
    arguments = ["--trainer.default_root_dir", str(tmp_path), "--model.adapter.init_args.alpha", "32"]
    with pytest.raises(SystemExit, match=r"alpha"):
        main(
            ["fit", "--config", str(config), *arguments, "--ckpt_path", str(checkpoint_of(uninterrupted, 3))]
        )

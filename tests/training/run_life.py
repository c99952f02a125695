"""What tests of a run's life share: tiny runs that are stopped, gone on with, compared and looked into."""

import csv
import os

import lightning as L
import torch
from safetensors.torch import load_file

from mmpeft.cli import main
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


def assert_equal_runs(one, other, unvalidated=None, missing=None):
    """``missing`` says which rows of the curves may be one's alone: a validation that was killed is left out."""
    for name, tensors in trained(one).items():
        for key, tensor in tensors.items():
            assert torch.equal(trained(other)[name][key], tensor), (name, key)
    left_out = [row for row in curves(one) if "val_loss" in row and row["step"] == str(unvalidated)]
    assert len(left_out) == (unvalidated is not None)
    found = curves(other)
    if missing is not None:
        left_out += [row for row in curves(one) if missing(row) and row not in found]
    assert [row for row in curves(one) if row not in left_out] == found


def curves(run):
    with (run / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def flip(path, share=0.5):
    content = bytearray(path.read_bytes())
    content[int(share * len(content))] ^= 1
    path.write_bytes(content)

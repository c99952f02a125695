"""A fit that is killed at random moments, again and again, ends as one that nothing disturbed."""

import os
import subprocess
import sys

import pytest
import torch

from tests.tiny import make_config
from tests.training.of_two import ROOT
from tests.training.run_life import assert_equal_runs

KILLS = 20


@pytest.mark.slow
def test_a_fit_killed_twenty_times_ends_as_one_that_was_not(tmp_path, tiny_base, tiny_data):
    """Losses, adapters and the optimiser's state, bit by bit."""
    adapter = {"class_path": "mmpeft.adapters.LoraConfig", "init_args": {"rank": 4, "dropout": 0.3}}
    trainer = {"max_steps": 60, "log_every_n_steps": 1}
    config = make_config(
        tmp_path / "config.yaml", tiny_base, tiny_data, model={"adapter": adapter}, trainer=trainer
    )
    told = subprocess.run(
        [sys.executable, "-m", "tests.training.killed_fits", str(config), str(KILLS)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert told.returncode == 0, told.stderr
    runs = dict(line.split() for line in told.stdout.splitlines() if line.startswith("killed-"))
    assert sum(map(int, runs.values())) >= KILLS
    whole = tmp_path / "whole"
    for run in runs:
        assert_equal_runs(whole, tmp_path / run, missing=lambda row: "val_loss" in row)
        one, other = (
            torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
            for folder in (whole, tmp_path / run)
        )
        states = (each["optimizer_states"][0]["state"] for each in (one, other))
        for state, twin in zip(*(own.values() for own in states), strict=True):
            assert all(torch.equal(state[key], twin[key]) for key in state)

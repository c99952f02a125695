"""How a run of several processes ends: all with a checkpoint where one gets a signal, and none alone."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from mmpeft.options import MMPEFT
from tests.tiny import run_directory
from tests.training.of_two import ROOT, children
from tests.training.run_life import make

SECONDS = 120.0


@pytest.fixture(params=["auto", pytest.param("model_parallel", marks=pytest.mark.slow)])
def begun(request, tmp_path, tiny_base, tiny_data):
    """A long fit in two processes after its first checkpoint: (first process, number of the other, run directory)."""
    how = {"max_steps": 100_000, "limit_val_batches": 0, "devices": 2, "strategy": request.param}
    config = make(tmp_path, tiny_base, tiny_data, **how)
    process = subprocess.Popen(
        [sys.executable, *MMPEFT, "fit", "--config", str(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    last, end = run_directory(config) / "checkpoints" / "last.ckpt", time.monotonic() + SECONDS
    while not last.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
    others = children(process.pid) if process.poll() is None else []
    yield process, others[0] if others else None, last
    process.kill()
    for other in others:
        if is_there(other):
            os.kill(other, signal.SIGKILL)


def is_there(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pid):
    end = time.monotonic() + 20
    while is_there(pid) and time.monotonic() < end:
        time.sleep(0.1)
    return not is_there(pid)


def test_a_signal_to_one_process_ends_all_with_a_checkpoint(begun):
    process, other, last = begun
    first = torch.load(last, weights_only=True)["global_step"]
    time.sleep(1)
    os.kill(other, signal.SIGTERM)
    told, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 143, told
    assert "keeps step" in told
    assert "Traceback" not in told
    assert gone(other)
    assert torch.load(last, weights_only=True)["global_step"] > first
    assert told.count("Go on with") == 1, "the first process alone tells"


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_first_with_an_error(begun):
    process, other, _ = begun
    os.kill(other, signal.SIGKILL)
    told, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 1, told
    assert "another process of this run has ended" in told
    assert "Go on with: mmpeft fit" in told


@pytest.mark.slow
def test_no_process_outlives_the_first(begun):
    process, other, _ = begun
    process.kill()
    assert gone(other)

"""Fits that are killed at random moments and gone on with: ``python -m tests.training.killed_fits CONFIG KILLS``.

Each is a fork of this process, which has imported everything, so that a kill costs no start. Prints the runs that were
ended, one a line, and how many kills each of them took.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path


def fit(words: list[str], seconds: float | None) -> bool:
    """Whether a fit ended by itself, within so many seconds."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            _fit(words)
            code = 0
        finally:
            os._exit(code)
    end = time.monotonic() + (600 if seconds is None else seconds)
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            assert status == 0, f"{words} ended with {status}"
            return True
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def _fit(words: list[str]) -> None:
    from mmpeft.cli import main
    from mmpeft.training import interruption

    interruption.SECONDS_BETWEEN, interruption.SHARE_OF_TIME = 0.0, 1e9  # a checkpoint a step
    main(["fit", *words])


def _run(config: str, kills: int) -> None:
    import torch

    import mmpeft.training.cli  # noqa: F401

    torch.set_num_threads(1)
    root, rng = Path(config).parent, random.Random(0)
    begun = time.monotonic()
    assert fit(["--config", config, f"--trainer.default_root_dir={root / 'whole'}"], None)
    whole, number, killed = time.monotonic() - begun, 0, 0
    while killed < kills:
        run, own = root / f"killed-{number}", 0
        number += 1
        new = ["--config", config, f"--trainer.default_root_dir={run}"]
        while True:
            there = list(run.glob("checkpoints/*.ckpt"))
            seconds = rng.uniform(0.3, 1) * whole if killed < kills else None
            if fit(["--run", str(run), "--resume"] if there else new, seconds):
                break
            killed, own = killed + 1, own + 1
        print(f"{run.name} {own}", flush=True)


if __name__ == "__main__":
    _run(sys.argv[1], int(sys.argv[2]))

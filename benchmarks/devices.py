"""What the processes of a fit send each other and how long that takes: the same fit in two of them, and in one.

    python -m benchmarks.devices --config configs/easy_vqa/instruct_lora.yaml --model.start_from null \\
        --trainer.max_steps 12

All on this machine's processors. The sending alone is what the later process of a step spends: the earlier one waits
for it besides.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parents[1]


def main(words: list[str]) -> None:
    """Entry point; also of the processes that it begins, which have a rank."""
    if rank := os.environ.get("LOCAL_RANK"):
        print(json.dumps(_watched(words, rank)), file=sys.__stdout__, flush=True)
        return
    for number in (1, 2):
        with TemporaryDirectory() as folder:
            told = _processes(number, [*words, f"--trainer.default_root_dir={folder}/run"])
        steps = [statistics.median(own["steps"]) for own in told]
        print(f"{number} of them: {1000 * max(steps):.1f} ms a step", end="")
        if number > 1:
            sent = [min(each) for each in zip(*(own["sent"] for own in told), strict=True)]
            share = statistics.median(sent) / max(steps)
            size = told[0]["bytes"] / len(told[0]["sent"])
            print(
                f", of which sending {1000 * statistics.median(sent):.2f} ms ({share:.2%}), {size:,.0f} bytes",
                end="",
            )
        print(flush=True)


def _processes(number: int, words: list[str]) -> list[dict[str, Any]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        known = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free.getsockname()[1]),
            "OMP_NUM_THREADS": "1",
        }
    command = [sys.executable, "-m", "benchmarks.devices", *words, f"--trainer.devices={number}"]
    begun = [
        subprocess.Popen(
            command, cwd=ROOT, env=os.environ | known | {"LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE
        )
        for rank in range(number)
    ]
    told = [each.communicate()[0] for each in begun]
    if any(each.returncode for each in begun):
        sys.exit("a process of the fit failed; what it said stands above")
    return [json.loads(own.splitlines()[-1]) for own in told]


def _watched(words: list[str], rank: str) -> dict[str, Any]:
    """The seconds of each step but the first, and of what it sends; and all bytes."""
    from mmpeft.cli import main as mmpeft
    from mmpeft.training.processes import Reduced
    from mmpeft.training.step import Step

    begun: list[float] = []
    sent: list[float] = []
    sizes: list[int] = []
    take = Step.take_gradients

    def timed(own: Callable[..., Any], size_of: Callable[[Any], int]) -> Callable[..., Any]:
        def call(self: Any, values: Any) -> Any:
            started = time.perf_counter()
            found = own(self, values)
            if sent:
                sent[-1] += time.perf_counter() - started
                sizes.append(size_of(values))
            return found

        return call

    def step(self: Any, accumulated: int) -> None:
        begun.append(time.perf_counter())
        sent.append(0.0)
        take(self, accumulated)

    Reduced.sum = timed(Reduced.sum, lambda tensor: tensor.nbytes)  # pyright: ignore
    Reduced.sum_of_numbers = timed(Reduced.sum_of_numbers, lambda values: 8 * len(values))  # pyright: ignore
    Step.take_gradients = step
    mmpeft(["fit", *words, "--trainer.accelerator=cpu", "--trainer.limit_val_batches=0"])
    steps = [after - before for before, after in pairwise(begun)]
    return {"rank": rank, "steps": steps[1:], "sent": sent[1:-1], "bytes": sum(sizes)}


if __name__ == "__main__":
    main(sys.argv[1:])

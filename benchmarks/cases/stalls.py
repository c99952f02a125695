"""The worst of many decodes, beside an idle and beside a busy process: eight LoRA finetunes mixed, and `generate`.

A median does not show the one decode that waits for something. The busy process is a loop of Python that never ends.
"""

import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks import timing
from benchmarks.cases.decoding import OURS, THEIRS, Prompts
from benchmarks.race import Race, Run


def stalls(decodes: int = 20, tokens: int = 32, rows: int = 32, seed: int = 0) -> Iterator[Race]:
    """Ours and theirs take turns.

    Args:
        decodes: of each, of which the worst is told.
        tokens: that every row writes.
        rows: of the batch.
        seed: of prompts and weights.
    """
    prompts = Prompts(rows, seed)
    runs: dict[str, Run] = {OURS: prompts.mixed(tokens), THEIRS: prompts.generated(tokens)}
    for beside in ("an idle machine", "a busy process"):
        with busy_process(beside == "a busy process"):
            times = timing.alternate(runs, decodes, timing.seconds)
        worst = {name: lambda own=own: max(own) for name, own in times.items()}
        yield Race(
            f"the worst of {decodes} decodes, beside {beside}",
            worst,
            (THEIRS,),
            measured=True,
            repeats=0,
            told=lambda name, _, times=times: {"usual": statistics.median(times[name])},
        )


@contextmanager
def busy_process(busy: bool) -> Iterator[None]:
    """Inside, another process keeps a core busy, where it is to."""
    if not busy:
        yield
        return
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        other.kill()
        other.wait()

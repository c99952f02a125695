"""How the benchmarks measure: all cases in turn, again and again, in one process, and medians."""

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def alternate(cases: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each case over ``repeats`` rounds, after one round to warm up.

    Machines drift while they are measured; taking turns lets all cases drift alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for round_ in range(repeats + 1):
        for name, case in cases.items():
            started = time.perf_counter()
            case()
            if round_:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}


def report(**row: Any) -> None:
    """Prints one line of JSON with what was measured and where."""
    print(json.dumps(row | {"threads": torch.get_num_threads(), "cpu": processor()}), flush=True)


def processor() -> str:
    """The processor's name, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()

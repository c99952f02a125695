"""How the benchmarks measure: all runs in turn, again and again, in one process."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Watch = Callable[[Callable[[], Any]], float]
"""Calls a run and gives its figure."""


def seconds(run: Callable[[], Any]) -> float:
    """By the clock, until a GPU has ended too."""
    _end_of_gpu()
    started = time.perf_counter()
    run()
    _end_of_gpu()
    return time.perf_counter() - started


def returned(run: Callable[[], Any]) -> float:
    """What it says itself."""
    return float(run())


def gpu_memory(run: Callable[[], Any]) -> float:
    """The most GB that a GPU holds while it runs, beside what it held before."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    _end_of_gpu()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def alternate(runs: Mapping[str, Callable[[], Any]], repeats: int, watch: Watch) -> dict[str, list[float]]:
    """The figures of each run over ``repeats`` rounds, after one round to warm up.

    Machines drift while they are measured; taking turns lets all drift alike.
    """
    figures: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(repeats + 1):
        for name, run in runs.items():
            figure = watch(run)
            if round_ or not repeats:
                figures[name].append(figure)
    return figures


def _end_of_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()

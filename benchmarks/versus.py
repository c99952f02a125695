"""One case on two checkouts that take turns, run by run: the machine's drift meets both alike.

The case is started once per checkout, with its package and with its own cases where it has them. One JSON line per run:
the medians of both figures, and the ratio A / B, of seconds above 1 where B is faster.

    python -m benchmarks.versus ../before . decoding --repeats 7
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import timing
from benchmarks.__main__ import main

SIGN = "versus "
"""Lines of a child that begin so are for its parent: the run that waits for its turn, or its figure."""


def versus(checkout_a: str, checkout_b: str, *words: str) -> None:
    """Starts both, lets them take turns until they end, and prints the figures of each run.

    Args:
        checkout_a: one folder of the project.
        checkout_b: the other.
        words: of `python -m benchmarks`, in both.
    """
    for checkout in (checkout_a, checkout_b):  # without one, Python would take the package from elsewhere
        if not (package := Path(checkout) / "mmpeft" / "__init__.py").exists():
            sys.exit(f"{checkout} is no checkout of the project: there is no {package}")
    children = [_start(checkout, words) for checkout in (checkout_a, checkout_b)]
    figures: dict[str, tuple[list[float], list[float]]] = {}
    turn = 0
    while (waiting := [_told(child) for child in children]) != [None, None]:
        if waiting[0] != waiting[1]:
            sys.exit(
                f"the checkouts are to run the same, but one is at {waiting[0]}, the other at {waiting[1]}"
            )
        times = figures.setdefault(str(waiting[0]), ([], []))
        for number in (turn % 2, 1 - turn % 2):
            _say(children[number])
            times[number].append(float(str(_told(children[number]))))
        print(f"{waiting[0]}: {times[0][-1]:.4g}, {times[1][-1]:.4g}", file=sys.stderr)
        turn += 1
    for run, times in figures.items():
        a, b = (statistics.median(own[1:] or own) for own in times)  # the first rounds warm up
        row = {"run": run, "a": float(f"{a:.4g}"), "b": float(f"{b:.4g}"), "ratio": round(a / b, 3)}
        print(json.dumps(row), flush=True)


def _start(checkout: str, words: tuple[str, ...]) -> subprocess.Popen:
    paths = [str(Path(checkout).resolve()), str(Path(__file__).resolve().parents[1])]
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "benchmarks.versus", "--turns", *words],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _told(child: Any) -> str | None:
    """What the child says next; None where it has ended."""
    for line in child.stdout:
        if line.startswith(SIGN):
            return line.removeprefix(SIGN).rstrip("\n")
    if child.wait():
        sys.exit(f"{' '.join(child.args)} failed")
    return None


def _say(child: Any) -> None:
    child.stdin.write("\n")
    child.stdin.flush()


class Turns:
    """`timing.alternate` of a child, which may have several races."""

    races = 0

    def __call__(
        self, runs: Mapping[str, Callable[[], Any]], repeats: int, watch: timing.Watch
    ) -> dict[str, list[float]]:
        self.races += 1
        figures: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(repeats + 1):
            for name, run in runs.items():
                print(f"{SIGN}{self.races}: {name}", flush=True)
                sys.stdin.readline()
                figures[name].append(watch(run))
                print(f"{SIGN}{figures[name][-1]}", flush=True)
        return {name: own[1:] or own for name, own in figures.items()}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--turns"]:
        timing.alternate = Turns()
        main(sys.argv[2:])
    elif len(sys.argv) < 4:
        sys.exit(__doc__)
    else:
        versus(*sys.argv[1:])

"""One benchmark on two checkouts that take turns, case by case: the machine's drift meets both alike.

The script, each checkout's own where it has one, is started once per checkout with its package; its cases run
where it calls `timing.alternate`. One JSON line per case: both medians, and the ratio A / B, above 1 where B is faster.

    python benchmarks/versus.py ../before . benchmarks/decoding.py --repeats 7
"""

import json
import os
import runpy
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timing

SIGN = "versus "
"""Lines of a child that begin so are for its parent: the case that waits for its turn, or the seconds that it took."""


def versus(checkout_a: str, checkout_b: str, script: str, *arguments: str) -> None:
    """Starts both, lets them take turns until they end, and prints what each case took."""
    children = [_start(checkout, script, arguments) for checkout in (checkout_a, checkout_b)]
    seconds: dict[str, tuple[list[float], list[float]]] = {}
    turn = 0
    while (waiting := [_told(child) for child in children]) != [None, None]:
        if waiting[0] != waiting[1]:
            sys.exit(
                f"the checkouts are to run the same cases, but one is at {waiting[0]}, the other at {waiting[1]}"
            )
        times = seconds.setdefault(str(waiting[0]), ([], []))
        for number in (turn % 2, 1 - turn % 2):
            _say(children[number])
            times[number].append(float(str(_told(children[number]))))
        print(f"{waiting[0]}: {times[0][-1]:.3f} s, {times[1][-1]:.3f} s", file=sys.stderr)
        turn += 1
    for case, times in seconds.items():
        a, b = (statistics.median(own[1:]) for own in times)  # the first rounds warm up
        row = {"case": case, "a_seconds": round(a, 4), "b_seconds": round(b, 4), "ratio": round(a / b, 3)}
        print(json.dumps(row), flush=True)


def _start(checkout: str, script: str, arguments: tuple[str, ...]) -> subprocess.Popen:
    own = Path(checkout) / script  # an older checkout may lack it, or have it for its own names
    script = str((own if own.exists() else Path(script)).resolve())
    paths = [str(Path(checkout).resolve()), str(Path(script).parent)]
    return subprocess.Popen(
        [sys.executable, __file__, "--turns", script, *arguments],
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


def take_turns(cases: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """`timing.alternate` of a child."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats + 1):
        for name, case in cases.items():
            print(SIGN + name, flush=True)
            sys.stdin.readline()
            started = time.perf_counter()
            case()
            seconds[name].append(time.perf_counter() - started)
            print(SIGN + str(seconds[name][-1]), flush=True)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--turns"]:
        timing.alternate = take_turns
        sys.argv = sys.argv[2:]
        runpy.run_path(sys.argv[0], run_name="__main__")
    elif len(sys.argv) < 4:
        sys.exit(__doc__)
    else:
        versus(*sys.argv[1:])

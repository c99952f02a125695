"""Seconds of the processor that starting takes: `--help`, the import, and `mmpeft ask` of a run."""

import os
import subprocess
import sys
from collections.abc import Iterator

from benchmarks.race import Race, Run

QUESTION = "what color is the shape?"


def commands(run: str = "runs/quickstart", image: str | None = None) -> Iterator[Race]:
    """Each in a process of its own.

    Args:
        run: to ask; where it is not there nothing is asked.
        image: to ask about; without one the question is about text alone.
    """
    main = "from mmpeft.cli import main; main()"
    asked = ["ask", QUESTION, "--run", run, *([] if image is None else ["--image", image])]
    runs: dict[str, Run] = {
        "python -c pass": lambda: processor_seconds(["-c", "pass"]),
        "import mmpeft": lambda: processor_seconds(["-c", "import mmpeft"]),
        "mmpeft --help": lambda: processor_seconds(["-c", main, "--help"]),
    }
    if os.path.exists(run):
        runs["mmpeft ask"] = lambda: processor_seconds(["-c", main, *asked])
    yield Race("starting", runs, measured=True)


def processor_seconds(words: list[str]) -> float:
    """Of a Python with these arguments, of all its threads."""
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(words)} ended with {process.returncode}")
    return usage.ru_utime + usage.ru_stime

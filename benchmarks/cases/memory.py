"""Peak memory of the recipes, each run in a process of its own."""

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

from benchmarks.race import Race, case_function
from benchmarks.recipe import OURS

RECIPES = ("easy_vqa", "many_questions", "captions", "text")


def memory(of: list[str] = [*RECIPES]) -> Iterator[Race]:  # noqa: B006 never written to
    """The highest resident memory, libraries and all.

    Args:
        of: the cases.
    """
    for case in of:
        for race in case_function(case)():
            runs = {name: partial(peak, case, name) for name in race.runs}
            others = tuple(name for name in runs if name != OURS)
            yield Race(f"{race.title}: peak memory", runs, others, "MB", measured=True, repeats=0)


def peak(case: str, run: str) -> float:
    """MB of a process that does nothing but this."""
    words = [sys.executable, "-m", "benchmarks", case, "--only", run, "--repeats", "1"]
    told = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(told.splitlines()[-1])["peak_mb"]

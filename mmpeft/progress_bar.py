"""How far a long piece of work is: a bar where somebody watches, in a log a line every ten seconds."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm

SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def progress_bar(what: str, unit: str, total: int, done: int = 0) -> Iterator[Callable[[int], object]]:
    """Inside, what is yielded takes how many more are done. On stderr; work of less than ten seconds tells no log.

    Args:
        what: is done.
        unit: of the numbers.
        total: of them.
        done: before.
    """
    if sys.stderr.isatty():
        with tqdm(desc=what, unit=unit, total=total, initial=done) as bar:
            yield bar.update
        return
    last, told = time.monotonic(), done

    def update(number: int) -> None:
        nonlocal last, done, told
        done += number
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last, told = time.monotonic(), done
            print(f"{what}: {done:,} of {total:,} {unit}s", file=sys.stderr, flush=True)

    begun = told
    yield update
    if begun != told != done:
        print(f"{what}: {done:,} of {total:,} {unit}s", file=sys.stderr, flush=True)

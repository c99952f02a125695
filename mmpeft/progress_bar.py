"""How far a long piece of work is: a bar where somebody watches, in a log a line every ten seconds."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def progress_bar(what: str, unit: str, total: int, done: int = 0) -> Iterator[Callable[[int], object]]:
    """Inside, what is yielded takes how many more are done. On stderr, with the rate and the time left; work of less
    than ten seconds tells no log.

    Args:
        what: is done.
        unit: of the numbers.
        total: of them.
        done: before.
    """
    if sys.stderr.isatty():
        with _bar(what, unit, total, done) as shown:
            yield shown
        return
    first, begun, last, told = done, time.monotonic(), time.monotonic(), done

    def tell() -> None:
        rate = (done - first) / max(time.monotonic() - begun, 1e-9)
        left = f", {in_words((total - done) / rate)} left" if rate and done < total else ""
        line = f"{what}: {done:,} of {total:,} {unit}s, {rate:,.1f} {unit}s/s{left}"
        print(line, file=sys.stderr, flush=True)

    def update(number: int) -> None:
        nonlocal last, done, told
        done += number
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last, told = time.monotonic(), done
            tell()

    yield update
    if first != told != done:
        tell()


def in_words(seconds: float) -> str:
    """A length of time: ``50 s``, ``12 min``, ``3 h 5 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


@contextmanager
def _bar(what: str, unit: str, total: int, done: int) -> Iterator[Callable[[int], object]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        """How many a second."""

        def render(self, task: Task) -> Text:
            return Text("" if not task.speed else f"{task.speed:,.1f} {unit}s/s")

    columns = [
        TextColumn("{task.description}: {task.percentage:.0f}%"),
        BarColumn(),
        MofNCompleteColumn(separator="/"),
        Rate(),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=Console(file=sys.stderr), speed_estimate_period=120) as progress:
        task = progress.add_task(what, total=total, completed=done)
        yield lambda number: progress.advance(task, number)

"""Who writes a run directory: one process at a time, and a new fit beside what an earlier one left."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path

from filelock import FileLock, Timeout

from mmpeft.errors import RefusedError
from mmpeft.runs.layout import (
    BOARD,
    CARD,
    CHECKPOINTS,
    CONFIG,
    CURVES,
    EARLIER,
    LOCK,
    MANIFEST,
    PICTURES,
    PROJECTOR,
    TESTS,
    config_of,
)
from mmpeft.runs.manifest import no_run

OF_A_FIT = (
    *(MANIFEST, PROJECTOR, CONFIG, CURVES, BOARD, CHECKPOINTS),
    *("adapters", "examples", "report.png", CARD),
)
OF_TESTS = (
    *("predictions.jsonl", "metrics.json", "answers.jsonl", TESTS, config_of("test"), config_of("predict")),
    *("test.partial*.jsonl", "predict.partial*.jsonl", *(f"{picture}*.png" for picture in PICTURES)),
)


@contextmanager
def held(directory: str | Path) -> Iterator[None]:
    """Inside, this process alone writes the run directory, which is made where it is missing.

    Raises:
        RefusedError: another process writes it.
    """
    Path(directory).mkdir(parents=True, exist_ok=True)
    lock = FileLock(Path(directory) / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RefusedError(
            f"another mmpeft process is writing {directory}; wait for it, or name another "
            "--trainer.default_root_dir"
        ) from None
    try:
        yield
    finally:
        lock.release()


def require_finished(directory: str | Path) -> None:
    """Raises:
    RefusedError: no fit has ended there.
    """
    if (Path(directory) / MANIFEST).exists():
        return
    raise RefusedError(f"{no_run(directory)}; or give --untrained to ask what a fit would begin from")


def put_aside(directory: str | Path) -> Path | None:
    """Moves what an earlier fit and its tests left into ``previous/``, or ``previous-2/`` and so on: nothing that was
    trained is ever deleted.

    Returns:
        Where it is now; None where there was nothing.
    """
    directory = Path(directory)
    found = [path for pattern in (*OF_A_FIT, *OF_TESTS) for path in directory.glob(pattern)]
    if not any(path.exists() for path in (directory / MANIFEST, directory / CONFIG, directory / CURVES)):
        return None
    names = chain([EARLIER], (f"{EARLIER}-{number}" for number in count(2)))
    aside = next(directory / name for name in names if not (directory / name).exists())
    aside.mkdir()
    for path in found:
        path.rename(aside / path.name)
    print(f"what an earlier fit left in {directory} is now in {aside}")
    return aside

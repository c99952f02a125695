"""Who writes a run directory: one process at a time, and a new fit beside what an earlier one left."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path

from filelock import FileLock, Timeout

from mmpeft.errors import RefusedError
from mmpeft.runs.files import PROJECTOR
from mmpeft.runs.layout import CONFIG, CURVES, EARLIER, LOCK, TESTS, config_of
from mmpeft.runs.manifest import MANIFEST, no_run

OF_A_FIT = (
    MANIFEST,
    PROJECTOR,
    "adapters",
    "checkpoints",
    CONFIG,
    CURVES,
    "examples",
    "report.png",
    "README.md",
)
OF_TESTS = (
    *("predictions.jsonl", "metrics.json", "answers.jsonl", TESTS, config_of("test"), config_of("predict")),
    *("test.partial.jsonl", "predict.partial.jsonl", "confusion*.png", "calibration*.png", "changes*.png"),
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


def put_aside(directory: str | Path, keep: Sequence[Path] = ()) -> None:
    """Moves what an earlier fit and its tests left into ``previous/``, or ``previous-2/`` and so on: nothing that was
    trained is ever deleted.

    Args:
        directory: the run's.
        keep: files of the new fit.
    """
    directory = Path(directory)
    found = [path for pattern in (*OF_A_FIT, *OF_TESTS) for path in directory.glob(pattern)]
    found += [path for path in directory.glob("tensorboard/*") if path not in keep]
    if not any(path.exists() for path in (directory / MANIFEST, directory / CONFIG, directory / CURVES)):
        return
    names = chain([EARLIER], (f"{EARLIER}-{number}" for number in count(2)))
    aside = next(directory / name for name in names if not (directory / name).exists())
    for path in found:
        target = aside / path.relative_to(directory)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, target)
    print(f"what an earlier fit left in {directory} is now in {aside}")

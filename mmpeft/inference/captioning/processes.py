"""Workers of captioning on one machine: this process, or several, to which shard numbers are dealt.

A worker knows its pipe alone. It ends when that closes or this process ends, however that is.
"""

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from mmpeft.errors import RefusedError
from mmpeft.inference.captioning.job import Job, Tell
from mmpeft.paths import resolve
from mmpeft.runs.manifest import read_manifest

LIBRARIES = 2**30
"""Bytes of a worker beside its model."""
COPIES = 2
"""Of the base's weights, as they are multiplied: plain, and prepacked (`models/prepacked.py`)."""


def caption_here(job: Job, shards: Iterable[int], tell: Tell) -> None:
    """Makes shards in this process."""
    from mmpeft.inference.captioning.worker import Captioner

    with Captioner(job) as captioner:
        for shard in shards:
            captioner.make(shard, tell)


def caption_in_processes(job: Job, shards: Sequence[int], workers: int, tell: Tell) -> None:
    """Makes shards in processes of their own.

    Raises:
        RefusedError: a worker refuses, or has been killed; shards that were made are kept.
    """
    context: Any = multiprocessing.get_context("spawn")
    left = iter(shards)
    crew: dict[Any, Any] = {}
    try:
        for number in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, job, number), daemon=True)
            process.start()
            theirs.close()
            crew[ours] = process
            with _alive(process):
                ours.send(next(left, None))
        while crew:
            ready: list[Any] = wait(list(crew))
            for pipe in ready:
                if _hear(pipe, crew[pipe], tell):
                    shard = next(left, None)
                    with _alive(crew[pipe]):
                        pipe.send(shard)
                    if shard is None:
                        crew.pop(pipe).join()
    finally:
        for process in crew.values():
            process.kill()


@contextmanager
def _alive(process: Any) -> Iterator[None]:
    """Inside, its pipe is read or written.

    Raises:
        RefusedError: it has been killed.
    """
    try:
        yield
    except (EOFError, ConnectionError):  # whichever the system tells of one that was killed
        process.join()
        raise RefusedError(
            f"a worker ended with code {process.exitcode}, as when memory runs out (each --workers holds the model): "
            "what was written is whole, and the same command goes on from it"
        ) from None


def _hear(pipe: Any, process: Any, tell: Tell) -> bool:
    """Takes what a worker says; gives whether it wants another shard."""
    with _alive(process):
        kind, value = pipe.recv()
    if kind == "images":
        tell(value)
    elif kind == "refused":
        raise RefusedError(value)
    elif kind == "failed":
        raise RuntimeError(f"a worker failed:\n{value}")
    return kind == "done"


def _serve(pipe: Connection, job: Job, number: int) -> None:
    """The worker's process: shard numbers in, what has been done out, until None comes."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C at once, without a traceback of each
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        from mmpeft.inference.captioning.worker import Captioner

        with Captioner(job, _device(number)) as captioner:
            while (shard := pipe.recv()) is not None:
                captioner.make(shard, lambda images: pipe.send(("images", images)))
                pipe.send(("done", shard))
    except RefusedError as error:
        pipe.send(("refused", str(error)))
    except Exception:
        pipe.send(("failed", traceback.format_exc()))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "it was started by one"
    parent.join()
    os._exit(1)


def default_workers(job: Job) -> int:
    """One for each GPU; without one, for every ``threads`` cores, as many as memory holds models. A base that is no
    folder here, whose size is not known, is held once."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.device_count()
    from mmpeft.models.prepacked import free_memory

    name = read_manifest(job.run).language["name"]
    files = list(Path(job.run if name == "." else resolve(name)).glob("*.safetensors"))
    if not files:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    each = LIBRARIES + COPIES * sum(path.stat().st_size for path in files)
    return max(1, min(cores // job.task.threads, free_memory() // each))


def _device(number: int) -> str:
    """Of a worker: the GPUs in turn."""
    import torch

    return f"cuda:{number % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"

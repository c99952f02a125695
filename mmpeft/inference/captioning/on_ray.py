"""Workers of captioning on Ray: actors that get shard numbers and give back counts, never rows.

An actor that dies is started again and makes its shard once more, on whatever machine: a shard's bytes depend on its
number alone. Ray Data would lose the good images of a block with a bad one, and give files of other names each time.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from mmpeft.errors import RefusedError, refusal_in
from mmpeft.inference.captioning.job import Job, Tell

DEATHS = 5
"""Of actors over one shard, after which it is their own doing, as where memory has no room for the model, and no other
would fare better."""


def caption_on_ray(job: Job, shards: Sequence[int], workers: int | None, tell: Tell) -> None:
    """Makes shards on the cluster that RAY_ADDRESS names, or on one of this machine's own.

    Args:
        job: what is asked; its folders are seen by every machine.
        shards: the numbers.
        workers: actors; by default one a GPU, or one for every ``threads`` CPUs where there are none.
        tell: is told of images.

    Raises:
        RefusedError: Ray is not installed, a worker refuses, actors die again and again over one shard, or more workers
            than the cluster has room for.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray  # pyright: ignore[reportMissingImports] an extra
        from ray.exceptions import RayError, RayTaskError  # pyright: ignore[reportMissingImports]
        from ray.util import ActorPool  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise RefusedError("--engine ray needs the extra [ray]: pip install 'mmpeft[ray]'") from None
    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False, include_dashboard=False)
    try:
        needs = _needs(ray.cluster_resources(), job.task.threads, workers)
        kind: Any = ray.remote(max_restarts=-1, max_task_retries=DEATHS, **needs.each)(_Actor)
        count = min(needs.workers, len(shards))
        pool: Any = ActorPool([kind.remote(job, os.getcwd()) for _ in range(count)])
        made = pool.map_unordered(lambda actor, shard: actor.make.remote(shard), list(shards))
        for images in made:
            tell(images)
    except RayError as error:
        ours = isinstance(error, RayTaskError)  # else something was killed
        raise (refusal_in(getattr(error, "cause", None)) or _told(error, ours)) from error
    finally:
        if started:
            ray.shutdown()


class _Actor:
    """A captioner, made with the first shard, so that what it refuses is told by the shard's own error."""

    def __init__(self, job: Job, folder: str):
        self._job, self._folder, self._captioner = job, folder, None

    def make(self, shard: int) -> int:
        """Makes a shard; gives how many images it has."""
        from mmpeft.inference.captioning.worker import Captioner

        if self._captioner is None:
            os.chdir(self._folder)  # relative paths are seen from where the command was given
            self._captioner = Captioner(self._job)
        self._captioner.make(shard)
        return len(self._captioner.shards.images(shard))


class _Needs:
    """What each of how many workers needs of a cluster."""

    def __init__(self, workers: int, each: dict[str, Any]):
        self.workers, self.each = workers, each


def _needs(has: Mapping[str, float], threads: int, workers: int | None) -> _Needs:
    kind, each = ("GPU", 1) if has.get("GPU") else ("CPU", threads)
    most = int(has.get(kind, 0) // each)
    if (workers or 1) > most:
        raise RefusedError(
            f"{workers or 1} workers want {each} {kind} each, and the cluster has {has.get(kind, 0):g}: Ray would wait "
            "for ever; give fewer --workers or --threads, or more machines"
        )
    return _Needs(
        workers or most, {"num_gpus": 1.0, "num_cpus": 0.0} if kind == "GPU" else {"num_cpus": each}
    )


def _told(error: Exception, ours: bool) -> Exception:
    told = f"Ray ended the work: {error}; what was written is whole: give the same command again"
    return RuntimeError(told) if ours else RefusedError(told)

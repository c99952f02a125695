"""`mmpeft caption`: finds the images, looks which shards are missing, has them made, and joins them."""

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from mmpeft.data.image_lists import ImageList, Listed, find_images, left_out
from mmpeft.data.images.video_file import require_decoder
from mmpeft.errors import MissingFileError, RefusedError, require_positive
from mmpeft.files import read_json
from mmpeft.hashing import differences, hash_json
from mmpeft.inference.captioning.content import content_digits
from mmpeft.inference.captioning.job import Job, Task, make_job
from mmpeft.inference.captioning.output import LOCK, META, Format, Output, unicode_alone
from mmpeft.inference.captioning.processes import caption_here, caption_in_processes, default_workers
from mmpeft.inference.captioning.shards import Seal, Shards, publish
from mmpeft.progress_bar import progress_bar
from mmpeft.runs.manifest import read_manifest

EngineName = Literal["local", "ray"]


def caption(
    inputs: Sequence[str],
    run: str = "runs/quickstart",
    output: str = "captions.jsonl",
    task: Task = Task(),  # noqa: B008 it is frozen
    format: Format | None = None,
    workers: int | None = None,
    shard: str | None = None,
    engine: EngineName = "local",
    overwrite: bool = False,
) -> int:
    """Captions all images and videos of the inputs; called again, it makes what is missing. The arguments are those of
    `mmpeft caption`.

    Returns:
        How many images have an error.

    Raises:
        RefusedError: an unknown finetune, no images, or an output that belongs to something else.
    """
    require_positive("workers", workers)
    place, part = Output.named(output, format), Part.of_text(shard)
    if overwrite and shard is not None:
        raise RefusedError(
            f"--overwrite would remove other jobs' shards; remove {place.shards} before they begin"
        )
    task.finetunes(read_manifest(run))  # refused before a million files are looked at
    images = find_images(inputs, task.shows_videos, str(place.file))
    if images.num_videos:
        _require_decoder(images.num_videos)
    job = make_job(inputs, images, run, task, place.shards)
    if place.is_parquet:
        _require_unicode(images)
    with _held(place, shard):
        place.begin(job.meta, overwrite)
        shards = job.shards
        own = part.among(len(shards))
        there = _verified(shards, own, images, job)
        pace = _make(job, own, there, workers, engine)
        if images.left:
            print(left_out(images.left))
        if images.repeated:
            print(f"{images.repeated} rows whose image an earlier row has were left out")
        errors = _tell(place, shards, own, there, pace)
        _join_if_whole(place, shards)
        if shard is None:
            place.tidy()
    return errors


def join(folders: Sequence[str], output: str, format: Format | None = None) -> None:
    """Joins the shards of several outputs of one job, as ``--shard`` leaves them on machines without a common disk.

    Raises:
        RefusedError: they were made of different things, or a shard is nowhere whole.
    """
    place, sources = Output.named(output, format), [Output.named(folder, format) for folder in folders]
    metas = [read_json(source.shards / META) for source in sources]
    for folder, meta in zip(folders, metas, strict=True):
        if not meta:
            raise MissingFileError(
                f"{folder} has no shards: {Output.named(folder, format).shards / META} is missing"
            )
        if meta != metas[0]:
            told = "\n".join(differences(metas[0], meta, f"{folders[0]} has"))
            raise RefusedError(f"{folder} was made of other things than {folders[0]}:\n{told}")
    place.begin(metas[0], overwrite=False)
    shards = _shards_of(place, metas[0])
    for number in range(len(shards)):
        if shards.seal(number) is None:
            whole = [own for source in sources if (own := _shards_of(source, metas[0])).seal(number)]
            if whole:
                publish(shards.path(number), whole[0].path(number).read_bytes())
    if missing := [number for number in range(len(shards)) if shards.seal(number) is None]:
        raise RefusedError(
            f"{len(missing)} of {len(shards)} shards are in none of the folders, such as "
            f"{shards.path(missing[0]).name}; give their jobs' commands again"
        )
    _join_if_whole(place, shards)
    print(f"{place.file}: {shards.total:,} images joined")


@dataclass(frozen=True)
class Part:
    """A job's part of the shards: every ``of``-th, from the ``number``-th on, counted from 1."""

    number: int = 1
    of: int = 1

    @classmethod
    def of_text(cls, text: str | None) -> "Part":
        """``2/4`` is the second of four."""
        if text is None:
            return cls()
        first, _, last = text.partition("/")
        if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
            raise RefusedError(f"--shard is {text!r}; wanted number/jobs, from 1/4 to 4/4 for four jobs")
        return cls(int(first), int(last))

    def among(self, shards: int) -> range:
        return range(self.number - 1, shards, self.of)


def _shards_of(place: Output, meta: Mapping[str, Any]) -> Shards:
    return Shards(place.shards, meta, meta["images"]["count"], meta["shard_size"])


@contextmanager
def _held(place: Output, shard: str | None) -> Iterator[None]:
    """Inside, this output, or this job's part of it, is nobody else's on this machine."""
    path = f"{place.file}{'' if shard is None else '.' + shard.replace('/', 'of')}{LOCK}"
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path, timeout=0):
            yield
    except Timeout:
        raise RefusedError(
            f"another run is writing this output: it holds {path}; wait for it, or name another --output"
        ) from None


def _require_decoder(videos: int) -> None:
    try:
        require_decoder()
    except RefusedError as error:
        raise RefusedError(
            f"{videos:,} of the inputs {'is a video' if videos == 1 else 'are videos'}: {error}; or leave videos out "
            "with --frames 0"
        ) from None


def _require_unicode(images: ImageList) -> None:
    with unicode_alone():
        for name in images.names:
            name.encode()


def _verified(shards: Shards, own: Iterable[int], images: ImageList, job: Job) -> dict[int, Seal]:
    """The shards that are there, whole, and of the images as they are now.

    Raises:
        RefusedError: an image has been replaced since.
    """
    there: dict[int, Seal] = {}
    for number in own:
        seal = shards.seal(number)
        if seal is None:
            if shards.path(number).exists():
                print(f"{shards.path(number)} is damaged: it is made again", file=sys.stderr)
            continue
        listed = [images[image] for image in shards.images(number)]
        if hash_json([image.version() for image in listed]) != seal.versions:
            _require_contents(listed, seal, job, shards.path(number))
        there[number] = seal
    return there


def _require_contents(listed: Sequence[Listed], seal: Seal, job: Job, shard: Path) -> None:
    """Of files that are not those which were seen: copies are as good."""
    config = read_manifest(job.run).image_config
    for image, was in zip(listed, seal.contents, strict=True):
        if content_digits(image, config) != was:
            raise RefusedError(
                f"{job.output} was made with other images; {image.name!r} is not the one that "
                f"was captioned: remove {shard} to have those of its part captioned anew, --overwrite all, or name "
                "another --output"
            )


def _make(
    job: Job, own: range, there: Mapping[int, Seal], workers: int | None, engine: EngineName
) -> float | None:
    """Makes the shards that are missing; gives the images per second, or None where there were none."""
    shards = job.shards
    missing = [number for number in own if number not in there]
    if not missing:
        return None
    total, to_make = (sum(len(shards.images(n)) for n in numbers) for numbers in (own, missing))
    begun = time.perf_counter()
    with progress_bar("captioning", "image", total, total - to_make) as tell:
        if engine == "ray":
            from mmpeft.inference.captioning.on_ray import caption_on_ray

            caption_on_ray(job, missing, workers, tell)
        elif (count := min(len(missing), workers or default_workers(job))) == 1:
            caption_here(job, missing, tell)
        else:
            caption_in_processes(job, missing, count, tell)
    return to_make / (time.perf_counter() - begun)


def _tell(place: Output, shards: Shards, own: range, there: Mapping[int, Seal], pace: float | None) -> int:
    """What has become of this part of the images, in words; gives how many have an error."""
    seals = {number: shards.seal(number) for number in own}
    errors = sum(seal.errors for seal in seals.values() if seal)
    images = sum(len(shards.images(number)) for number in own)
    rows = sum(seal.rows for seal in there.values())
    told = f"{images - errors} of {images} captioned"
    told += f" ({rows} rows were there already)" if rows else ""
    told += f', {errors} error{"s" * (errors > 1)} (see the rows with "error")' if errors else ""
    print(f"{place.file}: {told}" + ("" if pace is None else f", {pace:.1f} images/s"))
    return errors


def _join_if_whole(place: Output, shards: Shards) -> None:
    missing = sum(shards.seal(number) is None for number in range(len(shards)))
    if missing:
        print(
            f"{missing} of {len(shards)} shards are other jobs': the last to end joins them into {place.file}"
        )
    elif not place.is_joined(shards):
        place.join(shards)

"""A captioning job: which images are asked what, by which finetunes, and how; in plain data, for any worker."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmpeft.data.choices import check_choices
from mmpeft.data.image_lists import ImageList
from mmpeft.data.records import IMAGE_MARKER, check_question
from mmpeft.data.video import NUM_FRAMES, VIDEO_MARKER, check_rate
from mmpeft.errors import RefusedError, require_positive
from mmpeft.hashing import hash_file, hash_json
from mmpeft.inference.captioning.shards import ENDING, Shards
from mmpeft.runs.layout import adapter_folder
from mmpeft.runs.manifest import Manifest, read_manifest

FORMAT = 1
"""Of the shards."""
SHARD_IMAGES = 256
OF_VIDEOS = ("frames", "fps")
"""What of a task decides about the rows of videos alone."""
Tell = Callable[[int], object]
"""Is told of so many images more."""


@dataclass(frozen=True)
class Task:
    """What is asked of every image, and how; all of it decides about the rows."""

    adapter: Sequence[str] | None = None
    """Finetunes, or "base"; None is the run's first."""
    question: Sequence[str] | None = None
    """Questions; None asks for a caption."""
    captions: bool = False
    """Whether captions are asked for beside questions; without any question they are."""
    choices: Sequence[str] | None = None
    """Answers that are ranked instead of writing; None are those that the finetune was trained to choose from."""
    max_new_tokens: int | None = None
    """Longest answer; None is as long as the longest that the run was trained on, and at least 64."""
    batch_size: int = 64
    """Images that are answered together."""
    threads: int = 1
    """Of a worker without GPU."""
    frames: int | None = None
    """Of each video, `NUM_FRAMES` by default, and with ``fps`` at most so many; 0 leaves videos out."""
    fps: float | None = None
    """Frames of each second of a video."""

    def __post_init__(self):
        for name in ("max_new_tokens", "batch_size", "threads"):
            require_positive(name, getattr(self, name))
        check_rate(self.fps)
        if (self.frames is not None and self.frames < 0) or (self.frames == 0 and self.fps is not None):
            raise RefusedError(
                f"frames is {self.frames}"
                + (f" and fps {self.fps}" if self.fps is not None else "")
                + "; wanted how "
                "many frames of each video, 1 or more, or 0 alone to leave videos out"
            )
        for question in self.question or ():
            check_question(question, "a question")
            if (markers := question.count(IMAGE_MARKER) + question.count(VIDEO_MARKER)) > 1:
                raise RefusedError(
                    f"the question {question!r:.80} has {markers} of {IMAGE_MARKER} and {VIDEO_MARKER}, and is asked "
                    "about one image or video at a time; leave one of them, or none"
                )
        if self.choices is not None:
            check_choices(self.choices, "choices")
        if twice := [name for name in self.adapter or () if list(self.adapter or ()).count(name) > 1]:
            raise RefusedError(f"adapter {twice[0]!r} is named twice; name it once")

    def finetunes(self, manifest: Manifest) -> list[str]:
        """The names of those that answer.

        Raises:
            UnknownNameError: there is no such one.
        """
        return [manifest.finetune(name) for name in self.adapter or [None]]

    @property
    def shows_videos(self) -> bool:
        return self.frames != 0

    @property
    def asks(self) -> list[str | None]:
        """The questions; None is a caption."""
        questions: list[str | None] = list(self.question or ())
        return [None, *questions] if self.captions or not questions else questions


@dataclass(frozen=True)
class Job:
    """What a worker must know to make any shard."""

    inputs: Sequence[str]
    run: str
    task: Task
    adapters: Sequence[str]
    """Those that answer, or "base"."""
    names_adapter: bool
    """Whether rows name it: where a run has no finetunes, "base" would read as if nothing had been trained."""
    meta: dict[str, Any]
    """What the rows depend on."""
    folder: str
    """Of the shards."""

    @property
    def shards(self) -> Shards:
        return Shards(Path(self.folder), self.meta, self.meta["images"]["count"], self.meta["shard_size"])

    @property
    def output(self) -> str:
        """The file of all rows."""
        return self.folder.removesuffix(ENDING)

    def require(self, images: ImageList) -> None:
        """Raises:
        RefusedError: a worker sees other images than those that the job is about.
        """
        if images.hash() != self.meta["images"]["names"]:
            raise RefusedError(
                f"{', '.join(self.inputs)}: {len(images):,} images are here, which are not the "
                f"{self.meta['images']['count']:,} that were listed; every machine must see the same files"
            )


def make_job(inputs: Sequence[str], images: ImageList, run: str, task: Task, folder: Path) -> Job:
    """The job of asking a run about some images.

    Raises:
        RefusedError: no run, or an unknown finetune.
    """
    manifest = read_manifest(run)
    adapters = task.finetunes(manifest)
    asked = asdict(task) | {"adapter": adapters, "question": task.asks}
    asked["frames"] = NUM_FRAMES if task.frames is None and task.fps is None else task.frames
    for name in ("captions", *(OF_VIDEOS if not images.num_videos else ())):
        del asked[name]
    meta = {
        "format": FORMAT,
        "images": {"count": len(images), "names": images.hash()},
        "run": {name: _identity(run, manifest, name) for name in adapters},
        **asked,
        "shard_size": SHARD_IMAGES,
    }
    return Job(list(inputs), run, task, adapters, bool(manifest.adapters), meta, str(folder))


def _identity(run: str, manifest: Manifest, adapter: str) -> str:
    """What decides about a finetune's answers; not its metrics and facts, which a later test changes."""
    files = sorted(adapter_folder(run, adapter).rglob("adapter_*"))
    projector = manifest.projectors.get(adapter, manifest.projector)
    held = {name: manifest.language.get(name) for name in ("dtype", "quantization", "attention")}
    how = [manifest.vision, manifest.template, manifest.instructions, manifest.max_new_tokens, held]
    if manifest.choices:
        how.append(manifest.choices.get(adapter))
    return hash_json([manifest.identity, *how, projector, [hash_file(path) for path in files]])

"""A worker of captioning: shard numbers in, shards on disk out, wherever it runs and beside whom.

Images, and the frames of videos, are read, hashed and decoded once, in a thread and a process beside the model, while
it answers about those before. Each is encoded once, whatever many questions and finetunes follow.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmpeft.data.encoder import images_at_once
from mmpeft.data.encoding import encode
from mmpeft.data.image_lists import Listed, find_images
from mmpeft.data.image_tokens import TokensByShape
from mmpeft.data.images import ImageLike, ImageWorker, image_key
from mmpeft.data.prefetch import ahead
from mmpeft.data.records import CAPTION_TASK, IMAGE_MARKER
from mmpeft.data.video import VIDEO_MARKER, sample_frames, times_of
from mmpeft.errors import RefusedError
from mmpeft.hashing import hash_json
from mmpeft.inference.captioning.content import DIGITS, content_of
from mmpeft.inference.captioning.job import Job, Tell
from mmpeft.inference.engine import Engine
from mmpeft.inference.requests import Completion, Request
from mmpeft.inference.vlm import load

DECIMALS = 4
"""Of log-probabilities in rows."""


@dataclass
class _Read:
    """An image or video that has been read."""

    listed: Listed
    version: Any
    key: str = ""
    """Of its content; empty where it could not be read."""
    pixels: dict[str, Any] = field(default_factory=dict)
    """Key of an image's or frame's content -> what the encoder's transform made of it."""
    shown: list[str] = field(default_factory=list)
    """The key of the image, or of each frame."""
    times: list[float | None] | None = None
    """Of the frames."""
    error: str | None = None


class Captioner:
    """Makes the shards of a job; a context manager, as decoding has a process of its own.

    Args:
        job: what is asked.
        device: "cpu", "cuda:1", or "auto".

    Raises:
        RefusedError: the run cannot be loaded, or other images are seen here than were listed.
    """

    def __init__(self, job: Job, device: str = "auto"):
        self.job, self.shards = job, job.shards
        self.images = find_images(job.inputs, job.task.shows_videos, job.output)
        job.require(self.images)
        self._threads = torch.get_num_threads()
        torch.set_num_threads(job.task.threads)
        self.vlm = load(job.run, device, job.task.batch_size)
        self._encoder, self._features = self.vlm.model.vision_encoder, _Features()
        template = self.vlm.template
        if isinstance(template.image_tokens, TokensByShape):
            template = copy.copy(template)
            template.image_tokens = self._features.num_tokens  # pyright: ignore[reportAttributeAccessIssue]
        features: Any = self._features
        self._engine = Engine(
            self.vlm.model, template, features, self.vlm.engine.packing, share=True, likely=True
        )
        self._decoder = ImageWorker()  # images are of unknown origin: none may hang

    def __enter__(self) -> "Captioner":
        return self

    def __exit__(self, *error: object) -> None:
        self._decoder.__exit__(*error)
        torch.set_num_threads(self._threads)

    def make(self, shard: int, tell: Tell = lambda images: None) -> int:
        """Makes one shard; gives how many of its images have an error."""
        numbers, size = self.shards.images(shard), self.job.task.batch_size
        chunks = [numbers[start : start + size] for start in range(0, len(numbers), size)]
        rows: list[dict[str, Any]] = []
        done: list[_Read] = []
        with closing(ahead(lambda chunk: self._begin(chunks[chunk]), range(len(chunks)))) as coming:
            for chunk in coming:
                rows += self._rows(chunk)
                for image in chunk:
                    image.pixels = {}
                done += chunk
                tell(len(chunk))
        versions = hash_json([image.version for image in done])
        return self.shards.write(shard, rows, versions, [image.key[:DIGITS] for image in done])

    # -- reading, in a thread of its own ----------------------------------------------------------------------

    def _begin(self, numbers: range) -> Callable[[], list[_Read]]:
        read = [self._read(self.images[number]) for number in numbers]
        return lambda: read

    def _read(self, listed: Listed) -> _Read:
        read = _Read(listed, listed.version())
        config, name = self._encoder.image_config, repr(listed.name)
        try:
            image, read.key = content_of(listed, config)
            if listed.is_video:
                self._read_frames(read, str(image))
            else:
                self._see(read, read.key, image, name)
        except (RefusedError, OSError) as error:
            read.error = str(error)
            read.pixels = {}
        return read

    def _read_frames(self, read: _Read, file: str) -> None:
        config, task, name = self._encoder.image_config, self.job.task, repr(read.listed.name)
        try:
            given = file, task.frames, task.fps
            frames = self._decoder.call(sample_frames, given, config.max_seconds, name)
            self._require_room(len(frames), name)
            for frame in frames:
                self._see(read, image_key(frame, config), frame, f"{name}, frame {frame.rpartition('=')[2]}")
            read.times = self._decoder.call(times_of, (frames,), config.max_seconds, name)
        except RefusedError as error:
            raise RefusedError(str(error).replace(file, read.listed.name)) from None

    def _see(self, read: _Read, key: str, image: ImageLike, name: str) -> None:
        decoded = self._decoder.load(image, self._encoder.image_config, source=name)
        read.pixels[key] = self._encoder.transform(decoded)
        read.shown.append(key)

    def _require_room(self, frames: int, name: str) -> None:
        """Before so many are decoded."""
        most, tokens = self.vlm.template.max_length, frames * (self._encoder.num_tokens or 1)
        if tokens > most:
            raise RefusedError(
                f"{name}: {frames:,} frames have {tokens:,} tokens, more than the run's max_length = {most}; give "
                "fewer --frames or a smaller --fps"
            )

    # -- answering --------------------------------------------------------------------------------------------

    def _rows(self, chunk: Sequence[_Read]) -> list[dict[str, Any]]:
        found = self._encode({key: own for image in chunk for key, own in image.pixels.items()})
        self._features.known = {key: own for key, own in found.items() if isinstance(own, Tensor)}
        for image in chunk:
            refused = [own for key in image.shown if isinstance(own := found.get(key), RefusedError)]
            if image.error is None and refused:
                image.error = str(refused[0])
        good = [image for image in chunk if image.error is None]
        requests = [self._requests(good, *pair) for pair in self._asked] if good else []
        answers = self._engine.answer([request for own in requests for request in own])
        rows: list[dict[str, Any]] = []
        number = {id(image): place for place, image in enumerate(good)}
        for image in chunk:
            if image.error is not None:
                rows.append(_named(image.listed) | {"error": image.error})
                continue
            for place, (adapter, question) in enumerate(self._asked):
                at = place * len(good) + number[id(image)]
                request = requests[place][number[id(image)]]
                rows.append(self._row(image.listed, adapter, question, request, answers[at]))
        self._features.known = {}
        return rows

    @property
    def _asked(self) -> list[tuple[str, str | None]]:
        """(finetune, question) of every row of an image."""
        return [(adapter, question) for adapter in self.job.adapters for question in self.job.task.asks]

    def _encode(self, pixels: Mapping[str, Any]) -> dict[str, Tensor | RefusedError]:
        keys, size = list(pixels), images_at_once(self._encoder, self.job.task.batch_size)
        parts = [keys[start : start + size] for start in range(0, len(keys), size)]
        return {
            key: own
            for part in parts
            for key, own in zip(part, encode(self._encoder, [pixels[key] for key in part]), strict=True)
        }

    def _requests(self, images: Sequence[_Read], adapter: str, question: str | None) -> list[Request]:
        asked, kind = (self.vlm.caption_instruction, CAPTION_TASK) if question is None else (question, None)
        task = self.job.task
        choices = None if task.choices is None else list(task.choices)
        sampling = self.vlm.sampling(task.max_new_tokens)
        shown = [tuple(image.shown) for image in images]
        questions = [_placed(asked, image) for image in images]
        requests, _ = self.vlm.requests(shown, questions, adapter, kind, sampling, choices)
        for request, image in zip(requests, images, strict=True):
            request.record["where"] = repr(image.listed.name)
            if image.times is not None:
                request.record["times"] = image.times
        return requests

    def _row(
        self, listed: Listed, adapter: str, question: str | None, request: Request, answer: Completion
    ) -> dict[str, Any]:
        row = _named(listed) | ({} if question is None else {"question": question})
        named = {"adapter": adapter} if self.job.names_adapter else {}
        if answer.error is not None:
            return row | named | {"error": answer.error}
        row |= {"caption" if question is None else "answer": answer.text} | named
        if answer.log_probability is not None:
            row["log_probability"] = round(answer.log_probability, DECIMALS)
        if ranking := answer.ranking(request):
            row["ranking"] = [{"choice": own, "score": round(score, DECIMALS)} for own, score in ranking]
        return row


class _Features:
    """The features of the images that are being asked about, in place of a cache: an image goes by its key."""

    def __init__(self):
        self.known: dict[str, Tensor] = {}

    def key(self, image: str) -> str:
        return image

    def load(self, images: Sequence[str]) -> list[Tensor]:
        return [self.known[image] for image in images]

    def num_tokens(self, image: str) -> int:
        return len(self.known[image])


def _placed(question: str, image: _Read) -> str:
    """The question with the image, or the frames of a video, where ``<image>`` or ``<video>`` stands in it: one folder
    may have both."""
    return question.replace(VIDEO_MARKER, IMAGE_MARKER).replace(IMAGE_MARKER, IMAGE_MARKER * len(image.shown))


def _named(listed: Listed) -> dict[str, Any]:
    return {"video" if listed.is_video else "image": listed.name} | (
        {} if listed.id is None else {"id": listed.id}
    )

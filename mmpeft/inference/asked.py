"""What a caller asks, one item or many, as records and choices that are aligned, or refused with its place."""

from collections.abc import Sequence
from typing import Any

from mmpeft.data.choices import check_choices
from mmpeft.data.images import ImageLike
from mmpeft.data.layouts.videos import place_videos
from mmpeft.data.records import IMAGE_MARKER, Record
from mmpeft.data.video import VIDEO_MARKER, Video, times_of
from mmpeft.errors import RefusedError

Image = ImageLike | Video
Images = Image | tuple[Image, ...] | None
"""What one question is about: an image or a video, several, or nothing."""


def record_of(images: Images, question: str, where: str, task: str | None) -> Record:
    """Of one question; ``<image>`` and ``<video>`` say where in it the images and videos stand, else they come first.

    Raises:
        RefusedError: it is no text, markers that do not fit, or a video of which no frame can be named.
    """
    listed = _listed(images)
    if not isinstance(question, str):
        raise RefusedError(f"{where} is {question!r:.80}; wanted text")
    each: list[list[Any]] = [own.names if isinstance(own, Video) else [own] for own in listed]
    videos = [names for own, names in zip(listed, each, strict=True) if isinstance(own, Video)]
    pictures: list[Any] = [own for own in listed if not isinstance(own, Video)]
    markers = question.count(IMAGE_MARKER), question.count(VIDEO_MARKER) if videos else 0
    if any(markers) and markers != (len(pictures), len(videos)):
        wanted = (
            f" and {len(videos)} videos were given; wanted a marker for each, or none"
            if videos
            else " were given"
        )
        raise RefusedError(f"{where} has {_told(*markers)} but {len(pictures)} images{wanted}")
    shown = [image for own in each for image in own]
    # an empty one stays so, for the engine to refuse
    text = question if any(markers) or not question.strip() else IMAGE_MARKER * len(shown) + question
    if markers[1]:
        ((_, text),), shown = place_videos([("user", question)], pictures, videos, marked=True)
    record = Record(id="", images=shown, turns=[(text, None)], task=task, where=where)
    if (times := times_of(shown)) is not None:
        record["times"] = times
    return record


def conversation_of(
    images: Images, question: str, where: str, task: str | None, history: Sequence[tuple[str, str]]
) -> Record:
    """Of a question and the earlier (question, answer) pairs, to the first of which the images belong."""
    if not history:
        return record_of(images, question, where, task)
    for number, turn in enumerate(history, 1):
        if len(turn) != 2 or not all(isinstance(text, str) and text.strip() for text in turn):
            raise RefusedError(
                f"turn {number} of the history is {turn!r:.80}; wanted a question and its answer, both with text"
            )
    (asked, answer), *others = history
    record = record_of(images, asked, where, task)
    ((first, _),) = record["turns"]
    record["turns"] = [(first, answer), *others, (question, None)]
    later = [answer, *(text for turn in others for text in turn), question]
    if any(IMAGE_MARKER in text for text in later):
        raise RefusedError(f"{where}: {IMAGE_MARKER} may stand in the first question of a conversation alone")
    if any(isinstance(own, Video) for own in _listed(images)) and any(
        VIDEO_MARKER in text for text in (*(text for text, _ in others), question)
    ):
        raise RefusedError(f"{where}: {VIDEO_MARKER} may stand in the first question of a conversation alone")
    return record


def choices_of(choices: Sequence[Any], places: Sequence[str]) -> list[list[str]]:
    """A list of choices for every question."""
    one = not isinstance(choices, str) and all(isinstance(choice, str) for choice in choices)
    given = [choices] * len(places) if one or isinstance(choices, str) else choices
    if len(given) != len(places):
        raise RefusedError(f"{len(given)} lists of choices for {len(places)} questions; give one for each")
    for own, where in zip(given, places, strict=True):
        check_choices(own, where)
    return [list(own) for own in given]


def aligned(image: Any, question: Any, adapter: Any) -> tuple[list[Any], list[Any], list[Any], bool]:
    """Lists of equal length, single values repeated; and whether nothing was a list."""
    values = {"image": image, "question": question, "adapter": adapter}
    lengths = {name: len(value) for name, value in values.items() if isinstance(value, list)}
    if len(set(lengths.values())) > 1:
        raise RefusedError(
            "lists of different length: " + ", ".join(f"{n} {name}s" for name, n in lengths.items())
        )
    length = next(iter(lengths.values()), 1)
    images, questions, adapters = (
        value if isinstance(value, list) else [value] * length for value in values.values()
    )
    return images, questions, adapters, not lengths


def _listed(images: Images) -> list[Image]:
    return [] if images is None else list(images) if isinstance(images, tuple) else [images]


def _told(images: int, videos: int) -> str:
    """Markers, of which videos have some."""
    return f"{images} {IMAGE_MARKER}" + (f" and {videos} {VIDEO_MARKER}" if videos else "")

"""The videos of a row as images: evenly spaced frames, which stand where ``<video>`` does."""

import re
from collections.abc import Sequence
from typing import Any, TypeVar

from mmpeft.data.formats import DataError
from mmpeft.data.images import ImageError, image_file
from mmpeft.data.layouts.fields import Fields
from mmpeft.data.layouts.image_root import ImageRoot
from mmpeft.data.layouts.notes import Notes
from mmpeft.data.layouts.pictures import refuse_unread
from mmpeft.data.layouts.tags import IMAGE_MARKER, Turn
from mmpeft.data.layouts.values import from_json, is_empty, short
from mmpeft.data.video import NUM_FRAMES, VIDEO_MARKER, sample_frames, times_of

Image = TypeVar("Image")
_MARKERS = re.compile(f"({re.escape(IMAGE_MARKER)}|{re.escape(VIDEO_MARKER)})")


def take_videos(fields: Fields, root: ImageRoot, notes: Notes) -> list[list[str]]:
    """The names of the frames of each video of a row.

    Raises:
        DataError: a video is not there or cannot be read, also where PyAV is not installed; or ``frames`` is no number.
    """
    files = take_video_files(fields, root)
    if not files:
        return []
    count = fields.take("frames")
    if count is None:
        notes.videos += len(files)
    return [_frames(file, _number(count), root) for file in files]


def take_video_files(fields: Fields, root: ImageRoot) -> list[str]:
    """The paths of the videos of a row.

    Raises:
        DataError: one is no name, or leads out of the root.
    """
    value = from_json(fields.take("video"))
    if is_empty(value):
        return []
    return [root.resolve(_name(video)) for video in (value if isinstance(value, list) else [value])]


def take_times(images: Sequence[str | bytes], root: ImageRoot) -> list[float | None] | None:
    """When the images of a row are shown that are frames of videos; None where none is.

    Raises:
        DataError: a video cannot be read.
    """
    for image in images:
        if isinstance(image, str) and (file := image_file(image)) != image:
            root.beside.looked_into(file)
    try:
        return times_of(images)
    except ImageError as error:
        raise DataError(f"video: {error}") from None


def place_videos(
    turns: list[Turn], images: Sequence[Image], videos: Sequence[Sequence[Image]], marked: bool
) -> tuple[list[Turn], list[Image]]:
    """The turns with an image marker for every frame, and all images in the order of their markers. Videos without
    ``<video>`` come first.

    Args:
        marked: whether ``<video>`` is a marker here, and not text.

    Raises:
        DataError: there is not one ``<video>`` for each video, or one stands in an answer.
    """
    found = [role for role, text in turns for _ in range(text.count(VIDEO_MARKER))] if marked else []
    if not found:
        return _in_front(turns, images, [frame for frames in videos for frame in frames])
    if len(found) != len(videos) or set(found) != {"user"}:
        raise DataError(
            f"found {len(found)} {VIDEO_MARKER} for {len(videos)} video(s); wanted one {VIDEO_MARKER} each, in "
            "questions, or none"
        )
    left, waiting = iter(images), iter(videos)
    ordered: list[Image] = []

    def place(tag: re.Match) -> str:
        frames = next(waiting) if tag[0] == VIDEO_MARKER else [image for image in [next(left, None)] if image]
        ordered.extend(frames)
        return IMAGE_MARKER * len(frames) if tag[0] == VIDEO_MARKER else tag[0]

    placed = [(role, _MARKERS.sub(place, text) if role == "user" else text) for role, text in turns]
    return placed, [*ordered, *left]


def _in_front(
    turns: list[Turn], images: Sequence[Image], frames: Sequence[Image]
) -> tuple[list[Turn], list[Image]]:
    marked = any(IMAGE_MARKER in text for _, text in turns)
    first = next((number for number, (role, _) in enumerate(turns) if role == "user"), None)
    if first is not None and (marked or not images):
        role, text = turns[first]
        turns = [*turns[:first], (role, IMAGE_MARKER * len(frames) + text), *turns[first + 1 :]]
    return turns, [*frames, *images]


def _name(video: Any) -> str:
    name = video
    if isinstance(video, dict):
        said = {key: value for key, value in video.items() if not is_empty(value)}
        given = [said.pop(key) for key in ("path", "video", "file") if key in said]
        refuse_unread(said, "video", video)
        name = given[0] if len(given) == 1 else None
    if not isinstance(name, str):
        raise DataError(f"found the video {short(video)}; wanted a file name")
    return name


def _frames(file: str, count: int, root: ImageRoot) -> list[str]:
    root.beside.looked_into(file)
    try:
        return sample_frames(file, count)
    except ImageError as error:
        raise DataError(f"video: {error}") from None


def _number(count: Any) -> int:
    if count is None:
        return NUM_FRAMES
    if isinstance(count, str) and count.strip().isdigit():
        count = int(count)
    if isinstance(count, float) and count.is_integer():
        count = int(count)
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise DataError(f"frames is {short(count)}; wanted how many frames of the video, 1 or more")
    return count

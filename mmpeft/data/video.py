"""Videos as images: the names of frames, which `load_image` decodes when they are needed, and when each is shown."""

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from mmpeft.data.images import ImageError
from mmpeft.data.images.formats import VIDEO, kind_of
from mmpeft.data.images.source import read_head, split_frame
from mmpeft.data.images.video_file import Timeline, timeline
from mmpeft.errors import RefusedError

NUM_FRAMES = 8
"""Of a video of which nobody says how many."""
VIDEO_MARKER = "<video>"
"""Where in a question the frames of a video stand; replaced by as many image markers as there are names."""
DIGITS = 6
"""Of a second that count: times in a file are multiples of its own unit."""


@dataclass(frozen=True)
class Video:
    """A video that a question is about: its frames are images, each with its time before it."""

    path: str | Path
    frames: int | None = None
    """See `sample_frames`."""
    fps: float | None = None
    """See `sample_frames`."""

    @property
    def names(self) -> list[str]:
        """Of the frames."""
        return sample_frames(self.path, self.frames, self.fps)


def check_rate(fps: float | None) -> None:
    """Raises:
    RefusedError: no number of frames a second.
    """
    is_number = isinstance(fps, Real) and not isinstance(fps, bool)
    if fps is not None and not (is_number and 0 < fps < math.inf):
        raise RefusedError(
            f"fps is {fps!r}; wanted frames of a second, above 0, such as 0.5 for one every two seconds"
        )


def sample_frames(path: str | Path, n: int | None = None, fps: float | None = None) -> list[str]:
    """Names of frames, such as "clip.mp4#frame=12".

    Without ``fps``, n of them evenly spaced from the first to the last: of N frames the i-th is
    floor(i (N - 1) / (n - 1)), numpy's linspace(0, N - 1, n) cut to integers; one frame alone is the middle one. They
    are spaced by number, not by time, where frames last differently long. A video of fewer than n frames gives each of
    its frames once. With ``fps`` the frames that are shown after 0, 1 / fps, 2 / fps, ... seconds, each once, and of
    more than n of these n evenly spaced ones.

    Args:
        path: A file of one video stream or more, of which the first counts. Nothing of it is decoded.
        n: At least 1; by default `NUM_FRAMES`, with fps all.
        fps: Frames of a second.

    Raises:
        ImageError: not a video, n no whole number of at least 1, no frame, or PyAV is not there.
        RefusedError: fps is no number above 0.
    """
    if n is not None and (not isinstance(n, Integral) or isinstance(n, bool) or n < 1):
        raise ImageError(
            f"{str(path)!r}: {n!r} frames were asked for; wanted how many, a whole number of at least 1"
        )
    check_rate(fps)
    shown = _timeline(str(path))
    places = range(len(shown.seconds)) if fps is None else _at_rate(shown.seconds, fps)
    most = len(places) if fps is not None else NUM_FRAMES
    return [f"{path}#frame={place}" for place in _evenly(places, most if n is None else n)]


def times_of(images: Iterable[Any]) -> list[float | None] | None:
    """When those images that are named as frames of videos are shown, in seconds from the first frame of each; None
    where there is none.

    Raises:
        ImageError: a video cannot be read.
    """
    times = [_time_of(image) for image in images]
    return times if any(time is not None for time in times) else None


def is_video(file: str) -> bool:
    """Whether a file is a video, by its content.

    Raises:
        ImageError: it is not a readable regular file.
    """
    return kind_of(read_head(file)) is VIDEO


def _time_of(image: Any) -> float | None:
    """Of one that is no frame of a video None, also where there is no such frame: decoding says so."""
    if not isinstance(image, str | Path) or "#frame=" not in str(image):
        return None
    file, frame = split_frame(image)
    if frame is None or not os.path.isfile(file) or not is_video(file):
        return None
    seconds = _timeline(file).seconds
    return seconds[frame] if frame < len(seconds) else None


def _timeline(path: str) -> Timeline:
    try:
        if not is_video(path):
            raise ImageError("no video that is known (MP4, MOV, Matroska, WebM, AVI, MPEG)")
        shown = timeline(path)
        if not shown.seconds:
            raise ImageError("the video has no frames; it is damaged or cut")
        return shown
    except ImageError as error:
        raise ImageError(f"{path!r}: {error}" if path not in str(error) else str(error)) from None
    except Exception as error:  # what a demuxer raises of damaged files
        raise ImageError(
            f"{path!r}: cannot be read ({type(error).__name__}: {error}); fetch it again"
        ) from error


def _evenly(places: Sequence[int], most: int) -> list[int]:
    count = min(most, len(places))
    if count == 1:
        return [places[(len(places) - 1) // 2]]
    return [places[i * (len(places) - 1) // (count - 1)] for i in range(count)]


def _at_rate(seconds: Sequence[float], fps: float) -> list[int]:
    """Numbers of the frames that are shown at a multiple of 1 / fps; the last is shown as long as the one before."""
    last = 2 * seconds[-1] - seconds[-2] if len(seconds) > 1 else seconds[-1] + 1 / fps
    ticks = [round(time * fps, DIGITS) for time in (*seconds, last)]
    return [place for place, (tick, end) in enumerate(pairwise(ticks)) if math.ceil(tick) < end]

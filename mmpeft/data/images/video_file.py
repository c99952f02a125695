"""Frames of video files (PyAV, the extra [video]): how many there are, when each is shown, and one by its number."""

import functools
from dataclasses import dataclass
from typing import Any

from PIL import Image

from mmpeft.data.images.config import ImageConfig
from mmpeft.data.images.formats import VIDEO, needs_extra
from mmpeft.data.images.frames import no_such_frame
from mmpeft.data.images.source import ImageError, check_pixels
from mmpeft.files import FileVersion, file_version


@dataclass(frozen=True)
class Timeline:
    """When the frames of a video are shown, in that order."""

    units: list[int | None]
    """In the stream's units; None where the file does not say."""
    seconds: list[float]
    """From the first frame on."""


def read_frame(file: str | bytes, frame: int | None, config: ImageConfig) -> Image.Image:
    """A frame in the order in which frames are shown, counted from 0, turned as the file says.

    Raises:
        ImageError: PyAV is not there, the name says no frame, or there is no such one.
    """
    if isinstance(file, bytes):
        raise ImageError("a video as bytes; wanted its file, with a frame such as clip.mp4#frame=12")
    if frame is None:
        raise ImageError(
            "a video; name a frame, such as clip.mp4#frame=12, or give it as a video: `ask --video`, or a row's "
            '"video" and "frames"'
        )
    times = timeline(file).units
    if frame >= len(times):
        raise no_such_frame(frame, len(times))
    ways = (False,) if None in times else (True, False)
    for seek in ways:  # not every container finds the key frame before a time
        if (image := _decoded(file, frame, times[frame], seek, config.max_pixels)) is not None:
            return image
    raise ImageError(f"frame {frame} of {len(times):,} cannot be decoded; the video is damaged or cut")


def _decoded(file: str, frame: int, time: int | None, seek: bool, max_pixels: int) -> Image.Image | None:
    """A frame, decoded from the beginning or from the key frame before it; None where it did not come."""
    with _open(file) as container:
        stream = container.streams.video[0]
        check_pixels((stream.width, stream.height), max_pixels)
        stream.codec_context.options = {"err_detect": "explode"}  # what is damaged is not painted over
        if seek:
            container.seek(time, stream=stream, backward=True)
        for number, shown in enumerate(container.decode(stream)):
            if number == frame if time is None else shown.pts == time:
                image = shown.to_image()
                return image.rotate(shown.rotation, expand=True) if shown.rotation else image
            if seek and shown.pts is not None and shown.pts > time:
                return None
    return None


def timeline(file: str) -> Timeline:
    """When each frame is shown. Nothing is decoded.

    Raises:
        ImageError: PyAV is not there, there are no pictures, or nothing in the file tells their times.
    """
    return _timeline(file, file_version(file))


@functools.lru_cache(maxsize=64)
def _timeline(file: str, version: FileVersion) -> Timeline:
    with _open(file) as container:
        if not container.streams.video:
            raise ImageError("found sound without pictures; wanted a video")
        stream = container.streams.video[0]
        packets = container.demux(stream)
        times = [packet.pts for packet in packets if packet.size and not packet.is_discard]
        if None in times or len(set(times)) != len(times):
            return Timeline([None] * len(times), _evenly(len(times), stream))
        times.sort()
        return Timeline(times, [float((time - times[0]) * stream.time_base) for time in times])


def _evenly(count: int, stream: Any) -> list[float]:
    """The seconds of frames of which the file says only how many there are in one."""
    rate = stream.average_rate or stream.guessed_rate
    if not rate:
        raise ImageError(
            "the file tells neither when its frames are shown nor how many there are in a second; save it as MP4"
        )
    return [float(number / rate) for number in range(count)]


def require_decoder() -> None:
    """Raises:
    ImageError: PyAV is not there.
    """
    try:
        import av  # noqa: F401  # pyright: ignore[reportMissingImports] an extra
    except ImportError:
        raise needs_extra(VIDEO) from None


def _open(file: str) -> Any:
    require_decoder()
    import av  # pyright: ignore[reportMissingImports] an extra

    return av.open(file)

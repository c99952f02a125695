"""Frames of video files (PyAV, the extra [video]): how many there are, and one by its number."""

import functools
from typing import Any

from PIL import Image

from mmpeft.data.images.config import ImageConfig
from mmpeft.data.images.formats import VIDEO, needs_extra
from mmpeft.data.images.frames import no_such_frame
from mmpeft.data.images.source import ImageError, check_pixels
from mmpeft.files import FileVersion, file_version


def read_frame(file: str | bytes, frame: int | None, config: ImageConfig) -> Image.Image:
    """A frame in the order in which frames are shown, counted from 0, turned as the file says.

    Raises:
        ImageError: PyAV is not there, the name says no frame, or there is no such one.
    """
    if isinstance(file, bytes):
        raise ImageError("a video as bytes; wanted its file, with a frame such as clip.mp4#frame=12")
    if frame is None:
        raise ImageError(
            'a video; name a frame, such as clip.mp4#frame=12, or write the row with "video" and "frames"'
        )
    times = frame_times(file)
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


def frame_times(file: str) -> list[int | None]:
    """When each frame is shown, in the order of showing and in the stream's units; None where the file does not say.

    Nothing is decoded.
    """
    return _frame_times(file, file_version(file))


@functools.lru_cache(maxsize=64)
def _frame_times(file: str, version: FileVersion) -> list[int | None]:
    with _open(file) as container:
        if not container.streams.video:
            raise ImageError("found sound without pictures; wanted a video")
        packets = container.demux(container.streams.video[0])
        times = [packet.pts for packet in packets if packet.size and not packet.is_discard]
    if None in times or len(set(times)) != len(times):
        return [None] * len(times)
    return sorted(times)


def _open(file: str) -> Any:
    try:
        import av  # pyright: ignore[reportMissingImports] an extra
    except ImportError:
        raise needs_extra(VIDEO) from None
    return av.open(file)

"""Videos as images: the names of evenly spaced frames, which `load_image` decodes when they are needed."""

from pathlib import Path

from mmpeft.data.images import ImageError
from mmpeft.data.images.formats import VIDEO, kind_of
from mmpeft.data.images.source import read_head
from mmpeft.data.images.video_file import frame_times

NUM_FRAMES = 8
"""Of a video whose row does not say ``frames``."""
VIDEO_MARKER = "<video>"
"""Where in a question the frames of a video stand; replaced by as many image markers as there are names."""


def sample_frames(path: str | Path, n: int) -> list[str]:
    """Names of n frames, such as "clip.mp4#frame=12", evenly spaced from the first to the last.

    Of N frames the i-th is floor(i (N - 1) / (n - 1)), numpy's linspace(0, N - 1, n) cut to integers; one frame alone
    is the middle one. They are spaced by number, not by time, where frames last differently long. A video of fewer
    than n frames gives each of its frames once.

    Args:
        path: A file of one video stream or more, of which the first counts. Nothing of it is decoded.
        n: At least 1.

    Raises:
        ImageError: not a video, n below 1, no frame, or PyAV is not there.
    """
    if n < 1:
        raise ImageError(f"{str(path)!r}: {n} frames were asked for; wanted at least 1")
    try:
        if kind_of(read_head(str(path))) is not VIDEO:
            raise ImageError("no video that is known (MP4, MOV, Matroska, WebM, AVI, MPEG)")
        total = len(frame_times(str(path)))
        if not total:
            raise ImageError("the video has no frames; it is damaged or cut")
    except ImageError as error:
        raise ImageError(f"{str(path)!r}: {error}" if str(path) not in str(error) else str(error)) from None
    except Exception as error:  # what a demuxer raises of damaged files
        raise ImageError(
            f"{str(path)!r}: cannot be read ({type(error).__name__}: {error}); fetch it again"
        ) from error
    count = min(n, total)
    places = [i * (total - 1) // (count - 1) for i in range(count)] if count > 1 else [(total - 1) // 2]
    return [f"{path}#frame={place}" for place in places]

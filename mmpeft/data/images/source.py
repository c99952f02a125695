"""What an image is named by and read from: paths, frames of files with several, and bytes."""

import os
import re
import stat
from pathlib import Path

from PIL import Image

from mmpeft.data.images.config import ImageConfig
from mmpeft.errors import RefusedError

ImageLike = str | Path | bytes | Image.Image

_FRAME = re.compile(r"(.+)#frame=(\d+)", re.DOTALL)
_HEAD = 4096


class ImageError(RefusedError):
    """An image cannot be used; the message names it, what was found, what was wanted and what to do."""


def split_frame(name: str | Path) -> tuple[str, int | None]:
    """`scan.dcm#frame=3` -> (`scan.dcm`, 3); without frame, or of a file that is really called so -> (name, None).

    Frames are counted from 0: pages of a TIFF, slices of a volume, frames of an animation, a DICOM file or a video.
    """
    match = _FRAME.fullmatch(str(name)) if "#frame=" in str(name) else None
    if match is None or os.path.lexists(name):
        return str(name), None
    return match[1], int(match[2])


def image_file(name: str | Path) -> str:
    """The file that holds an image, whichever of its frames is meant."""
    return split_frame(name)[0]


def read_head(file: str | bytes) -> bytes:
    """The beginning of a file or of encoded bytes, enough to know its format.

    Raises:
        ImageError: it is not a readable regular file.
    """
    return file[:_HEAD] if isinstance(file, bytes) else _read(file, _HEAD)


def read_bytes(image: str | Path | bytes, *, max_bytes: int = ImageConfig.max_bytes) -> bytes:
    """The encoded bytes of an image file, or `image` itself if it is bytes.

    Args:
        max_bytes: Largest size accepted, in bytes.

    Raises:
        ImageError: If `image` is not a readable regular file, is empty, or has more than `max_bytes` bytes.
    """
    if isinstance(image, bytes):
        return _checked_size(image, "image bytes", max_bytes)
    require_name(image)
    file = image_file(image)
    return _checked_size(_read(file, max_bytes + 1), file, max_bytes)


def require_name(image: object) -> None:
    """Raises:
    ImageError: `image` is not the name of a local file.
    """
    if not isinstance(image, str | Path):
        raise ImageError(f"found a {type(image).__name__}; wanted a path, bytes or a PIL image")
    name = str(image)
    if name.startswith(("http://", "https://", "data:")):
        raise ImageError(f"{name[:80]!r} is a URL; wanted a local file: download it, pass its path or bytes")


def check_pixels(size: tuple[int, int], max_pixels: int) -> None:
    """Raises:
    ImageError: a (width, height) without pixels or with too many.
    """
    width, height = size
    if width < 1 or height < 1 or width * height > max_pixels:
        raise ImageError(
            f"{width} x {height} pixels; wanted 1 to {max_pixels:,} pixels (image.max_pixels); scale the image, or "
            "raise the limit"
        )


def _read(file: str, size: int) -> bytes:
    try:
        if not stat.S_ISREG(os.stat(file).st_mode):  # before the open: opening a pipe waits for ever
            raise OSError("not a regular file but a folder, pipe or device")
        with open(file, "rb") as opened:
            return opened.read(size)
    except FileNotFoundError:
        raise ImageError(f"{file!r} does not exist; check the path and the image root") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL or a lone surrogate in the path
        raise ImageError(f"{file!r} cannot be read ({error}); pass one readable image file") from error


def _checked_size(data: bytes, name: str, max_bytes: int) -> bytes:
    if not data:
        raise ImageError(f"{name!r} is empty (0 bytes); fetch it again or drop the row")
    if len(data) > max_bytes:
        raise ImageError(
            f"{name!r} has more than {max_bytes:,} bytes (image.max_bytes); save it smaller, or raise the limit"
        )
    return data

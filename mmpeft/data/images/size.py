"""How large an image is once it is decoded and upright: from its header alone where that is certain."""

import io
import struct
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from mmpeft.data.images.config import ImageConfig
from mmpeft.data.images.decode import DEFAULT, load_image
from mmpeft.data.images.formats import format_of
from mmpeft.data.images.source import ImageLike, read_head, require_name, split_frame
from mmpeft.data.images.upright import turn_of

TOLD_BY_HEADER = ("JPEG", "PNG", "WEBP", "BMP")
"""Formats whose size and orientation can be known without their pixels. GIF may grow with its frames, TIFF is turned by
pillow itself; these and others are decoded."""
WORDS = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")
"""Chunks of a PNG that may hold its orientation, also behind the pixels."""
SIDEWAYS = (
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
)


def image_size(
    image: ImageLike,
    config: ImageConfig = DEFAULT,
    decode: Callable[[ImageLike, ImageConfig], Image.Image] = load_image,
) -> tuple[int, int]:
    """(width, height) of what `load_image` makes of an image.

    Args:
        decode: what reads those whose header does not tell.

    Raises:
        ImageError: it cannot be read. Whether one whose header tells is whole shows when it is decoded.
    """
    if isinstance(image, Image.Image):
        image.load()  # after which pillow has turned what it turns itself
        return _upright(image)
    size = _told_by_header(image)
    return decode(image, config).size if size is None else size


def _told_by_header(image: str | Path | bytes) -> tuple[int, int] | None:
    """None where the header may not tell, or is damaged: decoding says what is wrong."""
    if not isinstance(image, bytes):
        require_name(image)
        image, frame = split_frame(image)
        if frame is not None:
            return None
    form = format_of(read_head(image))
    if form not in TOLD_BY_HEADER:
        return None
    try:
        with io.BytesIO(image) if isinstance(image, bytes) else open(image, "rb") as file:
            if form == "PNG":
                return _size_of_png(file)
            from mmpeft.data.images.pillow_file import open_header  # numpy, which naming images does not need

            with open_header(file, (form,)) as opened:
                return _upright(opened)
    except Exception:  # decoders raise nearly any type on hostile bytes
        return None


def _upright(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    return (height, width) if turn_of(image) in SIDEWAYS else (width, height)


def _size_of_png(file: BinaryIO) -> tuple[int, int] | None:
    """From chunk to chunk, of which none is read but the first. None where one may tell an orientation."""
    file.seek(16)
    size = struct.unpack(">II", file.read(8))
    file.seek(8)
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind in WORDS:
            return None
        file.seek(length + 4, io.SEEK_CUR)
    return size

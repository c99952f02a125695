"""Image files that pillow opens, and what its modes lose of them: more than 8 bits, signs, white as zero."""

import contextlib
import io
import warnings
from dataclasses import replace
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile

from mmpeft.data.images.config import ImageConfig
from mmpeft.data.images.deep_files import jpeg2000_grey, png_colour, read_tiff
from mmpeft.data.images.depth import Samples
from mmpeft.data.images.formats import FORMATS, unknown
from mmpeft.data.images.frames import NOTES, choose_frame, no_such_frame
from mmpeft.data.images.netpbm import deep_netpbm
from mmpeft.data.images.source import ImageError, check_pixels
from mmpeft.data.images.upright import turn_of

WIDE_GREY = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
"""Modes of more than 8 bits, whose `convert("RGB")` clips: a 16-bit ramp would turn white."""
KIND_OF_PAGE, BITS, PHOTOMETRIC, PARTS, SAMPLE_FORMAT, DNG_VERSION = 254, 258, 262, 330, 339, 50706
"""Tags of TIFF: NewSubfileType, BitsPerSample, PhotometricInterpretation, SubIFDs, SampleFormat, and DNG's."""
PREVIEW, WHITE_IS_ZERO, SIGNED = 1, 0, 2

Decoded = Image.Image | Samples


def open_file(
    data: bytes, frame: int | None, config: ImageConfig, source: str, formats: tuple[str, ...] = FORMATS
) -> tuple[Decoded, Image.Transpose | None]:
    """The pixels of an encoded image, and the turn that makes it upright.

    Args:
        frame: as its name says it; None is `config.frame`.

    Raises:
        ImageError: an unknown format, or an image that is too large.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ImageError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set, so that cut files decode half grey; leave it False"
        )
    try:
        opened = _open(data, formats)
    except Image.UnidentifiedImageError:
        if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+") and data[8:10] != b"CR":
            return read_tiff(data, frame, config, source)
        raise unknown(data) from None
    with opened:
        try:
            _go_to_frame(opened, frame, config, source)
        except EOFError:
            count = getattr(_open(data, formats), "n_frames", 1)  # which pillow miscounts after the end
            raise no_such_frame(frame or 0, count) from None
        check_pixels(opened.size, config.max_pixels)
        return _samples(opened, data, config, source), turn_of(opened)


def as_samples(image: Image.Image) -> Decoded:
    """A PIL image as it is, or as samples where its mode has more than 8 bits; a copy."""
    image.load()
    if image.mode not in WIDE_GREY:
        return image
    values = np.asarray(image)
    hidden = image.info.get("transparency")
    alpha = np.where(values == hidden, 0, 255).astype(np.uint8) if isinstance(hidden, int) else None
    return Samples(values, alpha=alpha)


def open_header(file: BinaryIO, formats: tuple[str, ...]) -> Image.Image:
    """With its header read and nothing decoded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `max_pixels` decides
        return Image.open(file, formats=formats)


def _open(data: bytes, formats: tuple[str, ...]) -> Image.Image:
    return open_header(io.BytesIO(data), formats)


def _go_to_frame(image: Image.Image, frame: int | None, config: ImageConfig, source: str) -> None:
    """Several pictures in a phone's JPEG (MPO) or HEIC are its preview and depth: its first is the picture meant."""
    is_photo = image.format in ("MPO", "HEIF")
    if frame is None and (config.frame == "first" or is_photo):
        if not is_photo and _has_more(image):
            NOTES.tell(source, 0)
        return
    if frame is None:
        frame = choose_frame(None, getattr(image, "n_frames", 1), config.frame, source)
    image.seek(frame)


def _has_more(image: Image.Image) -> bool:
    with contextlib.suppress(Exception):  # a damaged second frame is no matter of the first
        return bool(getattr(image, "is_animated", False))
    return False


def _samples(image: Image.Image, data: bytes, config: ImageConfig, source: str) -> Decoded:
    if image.format == "TIFF":
        return _tiff(image, data, config, source)
    if image.format == "PNG" and data[24] == 16 and data[25] != 0:
        if image.tell():
            raise ImageError("a later frame of a PNG of 16 bits a colour; only its first can be read")
        return png_colour(data, image.info.get("transparency"))
    if image.format == "PPM" and (deep := deep_netpbm(data)) is not None:
        return deep
    if image.format == "JPEG2000":
        return jpeg2000_grey(data, as_samples(image))
    return as_samples(image)


def _tiff(image: Image.Image, data: bytes, config: ImageConfig, source: str) -> Decoded:
    """By pillow where it keeps all bits, with the sign and the meaning of zero that it leaves out; else by tifffile."""
    tags = image.tag_v2  # pyright: ignore[reportAttributeAccessIssue]
    if DNG_VERSION in tags or (PARTS in tags and tags.get(KIND_OF_PAGE, 0) & PREVIEW):
        raise ImageError(
            "found a camera raw file (DNG, NEF, ARW), whose first page is a preview; develop it to JPEG, PNG or TIFF"
        )
    bits, signed = tags.get(BITS, (1,)), tags.get(SAMPLE_FORMAT, (1,))[0] == SIGNED
    if max(bits) > 8 and (len(bits) > 1 or image.mode not in WIDE_GREY):
        return read_tiff(data, image.tell(), config, source)[0]
    if max(bits) <= 8 and not signed:
        return as_samples(image)
    if len(bits) > 1:
        raise ImageError("a TIFF of several signed channels; wanted unsigned colour or grey")
    samples = as_samples(image)
    if not isinstance(samples, Samples):  # 8 bits with a sign, which pillow reads as if without
        samples = Samples(np.asarray(image).view(np.int8))
    elif max(bits) == 32 and image.mode == "I" and not signed:  # and the other way round
        samples = replace(samples, values=samples.values.view(np.uint32))
    return replace(samples, inverted=tags.get(PHOTOMETRIC) == WHITE_IS_ZERO)

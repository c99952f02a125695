"""More than 8 bits in PNG, JPEG 2000 and TIFF, where pillow keeps the upper 8 alone or moves them."""

import io
import struct
from typing import Any

import numpy as np
from PIL import Image

from mmpeft.data.images.config import ImageConfig
from mmpeft.data.images.depth import Samples
from mmpeft.data.images.formats import Kind, needs_extra
from mmpeft.data.images.frames import choose_frame
from mmpeft.data.images.source import ImageError, check_pixels
from mmpeft.data.images.upright import EXIF_ORIENTATION, UPRIGHT

DEEP_TIFF = Kind("a TIFF of more than 8 bits a colour, or of 64-bit or 16-bit floats", "tiff")
UNASSOCIATED = 2
"""TIFF's word for transparency that colours are not multiplied with."""


def png_colour(data: bytes, hidden: object) -> Samples:
    """A PNG of 16 bits with several channels.

    Args:
        hidden: the colour that is transparent, of a file with tRNS.
    """
    import torch
    from torchvision.io import ImageReadMode, decode_png

    decoded = decode_png(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.UNCHANGED)
    values = decoded.permute(1, 2, 0).numpy()
    if values.shape[2] in (2, 4):
        return _with_alpha(values)
    shown = (values != np.asarray(hidden)).any(2) if isinstance(hidden, tuple) else None
    return Samples(values, alpha=None if shown is None else np.where(shown, 255, 0).astype(np.uint8))


def jpeg2000_grey(data: bytes, decoded: Image.Image | Samples) -> Image.Image | Samples:
    """Grey of 9 to 16 bits as it is stored, which pillow moves up to 16 bits.

    Raises:
        ImageError: colour of more than 8 bits, of which pillow keeps 8.
    """
    start = data.index(b"\xff\x4f\xff\x51") + 40  # Csiz of the SIZ marker. Source: ISO 15444-1, A.5.1
    (channels,) = struct.unpack_from(">H", data, start)
    depths = [data[start + 2 + 3 * channel] for channel in range(channels)]
    precision, is_signed = max(depth & 0x7F for depth in depths) + 1, bool(depths[0] & 0x80)
    if not isinstance(decoded, Samples):
        if precision > 8:
            raise ImageError(
                f"JPEG 2000 colour of {precision} bits; save it as a 16-bit PNG or TIFF, or with 8 bits"
            )
        return decoded
    values = decoded.values.astype(np.int32) >> (16 - precision)
    return Samples(values - (1 << (precision - 1)) if is_signed else values)


def read_tiff(
    data: bytes, frame: int | None, config: ImageConfig, source: str
) -> tuple[Samples, Image.Transpose | None]:
    """A page of a TIFF whose samples pillow does not keep, and the turn that makes it upright.

    Raises:
        ImageError: tifffile is not there, or the page is neither grey nor RGB.
    """
    try:
        import tifffile  # pyright: ignore[reportMissingImports] an extra
    except ImportError:
        raise needs_extra(DEEP_TIFF) from None
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page: Any = file.pages[choose_frame(frame, len(file.pages), config.frame, source, "pages")]
        check_pixels((page.imagewidth, page.imagelength), config.max_pixels)
        kind, axes = page.photometric.name, page.axes
        if kind not in ("MINISBLACK", "MINISWHITE", "RGB") or axes not in ("YX", "YXS", "SYX"):
            raise ImageError(
                f"a TIFF of {page.dtype} samples of the kind {kind}, shape {page.shape}; wanted grey or RGB"
            )
        if page.dtype is None or page.dtype.kind not in "uif":
            raise ImageError(f"a TIFF of {page.dtype} samples; wanted real numbers")
        values = page.asarray()
        alphas = [int(extra) for extra in page.extrasamples]
        turn = UPRIGHT.get(int(page.tags[EXIF_ORIENTATION].value) if EXIF_ORIENTATION in page.tags else 1)
    values = np.moveaxis(values, 0, -1) if axes == "SYX" else values
    colours = 3 if kind == "RGB" else 1
    if values.ndim == 2:
        return Samples(values, inverted=kind == "MINISWHITE"), turn
    if values.shape[2] == colours:
        return Samples(values), turn
    if values.shape[2] != colours + 1 or alphas != [UNASSOCIATED] or values.dtype != np.uint16:
        raise ImageError(
            f"a TIFF of {values.shape[2]} channels of {values.dtype} ({kind}, extra samples {alphas}); wanted grey or "
            "RGB, alone or with 16-bit transparency that colours are not multiplied with"
        )
    samples = _with_alpha(values)
    samples.inverted = kind == "MINISWHITE"
    return samples, turn


def _with_alpha(values: np.ndarray) -> Samples:
    """(height, width, 2 or 4) of 16 bits; the last channel is alpha."""
    colour = values[..., 0] if values.shape[2] == 2 else values[..., :3]
    alpha = np.rint(values[..., -1] * (255 / 65535)).astype(np.uint8)
    return Samples(colour, alpha=alpha)

"""Image decoding: from a file, bytes or a PIL image to one RGB image, by one rule.

Training, batch inference, the server and the demo decode through `load_image`, so an image gives the same
pixels everywhere. It is the only module that opens images with pillow. The rule, in order:

1. at most `MAX_BYTES` bytes, and a format of `FORMATS` found by content (the name's ending is not trusted);
2. at most `max_pixels` pixels, read from the header before anything is decoded;
3. the first frame, decoded completely (a cut file is an error, never a half-grey image);
4. turned upright by its EXIF orientation, if it has a readable one;
5. to RGB: wide grey (16 bit, 32 bit, float) from its own minimum..maximum to 0..255, transparency composed on
   the background, CMYK and the rest converted by pillow.
"""

import hashlib
import io
import os
import stat
from pathlib import Path

from PIL import Image, ImageFile

from mmpeft.errors import RefusedError

ImageLike = str | Path | bytes | Image.Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""What is decoded. Short on purpose: every further decoder is attack surface."""
MAX_BYTES = 64 * 2**20
MAX_PIXELS = 50_000_000

WIDE_GREY = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
"""Modes of more than 8 bits, whose `convert("RGB")` clips: a 16-bit ramp would turn white."""
EXIF_ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation to the transposition that undoes it; 1 and unknown values need none."""


class ImageError(RefusedError):
    """An image cannot be used; the message names it, what was found, what was wanted and what to do."""


def read_bytes(image: str | Path | bytes, *, max_bytes: int = MAX_BYTES) -> bytes:
    """The encoded bytes of an image file, or `image` itself if it is bytes.

    Args:
        max_bytes: Largest size accepted, in bytes.

    Raises:
        ImageError: If `image` is not a readable regular file, is empty, or has more than `max_bytes` bytes.
    """
    if isinstance(image, bytes):
        return _checked_size(image, "image bytes", max_bytes)
    if not isinstance(image, str | Path):
        raise ImageError(f"found a {type(image).__name__}; wanted a path, bytes or a PIL image")
    name = str(image)
    if name.startswith(("http://", "https://", "data:")):
        raise ImageError(f"{name[:80]!r} is a URL; wanted a local file: download it, pass its path or bytes")
    try:
        if not stat.S_ISREG(os.stat(image).st_mode):  # before the open: opening a pipe waits for ever
            raise OSError("not a regular file but a folder, pipe or device")
        with open(image, "rb") as file:
            data = file.read(max_bytes + 1)
    except FileNotFoundError:
        raise ImageError(f"{name!r} does not exist; check the path and the image root") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL or a lone surrogate in the path
        raise ImageError(f"{name!r} cannot be read ({error}); pass one readable image file") from error
    return _checked_size(data, name, max_bytes)


def load_image(
    image: ImageLike,
    *,
    background: tuple[int, int, int] = (255, 255, 255),
    max_pixels: int = MAX_PIXELS,
    source: str | None = None,
) -> Image.Image:
    """The image as a new RGB PIL image, by the rule at the top of this module.

    A PIL image goes through the same rule from step 2 on, at the frame it stands at, and is not changed. The
    result carries no metadata, so loading it again gives the same pixels.

    Args:
        background: RGB colour, 0..255, under transparent pixels.
        max_pixels: Most pixels (width x height) accepted.
        source: Name for error messages, e.g. `"train.jsonl:12"`; default: the path, if there is one.

    Raises:
        ImageError: If any step of the rule fails.
    """
    source = source or (repr(str(image)) if isinstance(image, str | Path) else "image")
    try:
        if isinstance(image, Image.Image):
            return _to_rgb(image, background, max_pixels)
        with _open(read_bytes(image)) as opened:
            return _to_rgb(opened, background, max_pixels)
    except ImageError as error:
        message = str(error)
        raise ImageError(message if source in message else f"{source}: {message}") from error.__cause__
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{source}: {error}; wanted at most {max_pixels:,}; scale the image down") from None
    except Exception as error:  # decoders raise nearly any type on hostile bytes
        raise ImageError(
            f"{source}: cannot be decoded ({type(error).__name__}: {error}); wanted a complete, undamaged "
            "image; fetch or save it again, or drop the row"
        ) from error


def image_key(image: ImageLike) -> str:
    """The sha256, as 64 hex digits, of the encoded bytes, or of size and RGB pixels for a PIL image.

    The two kinds cannot share a key: the pixels are hashed behind a prefix no image file begins with.
    """
    if not isinstance(image, Image.Image):
        return hashlib.sha256(read_bytes(image)).hexdigest()
    rgb = load_image(image)
    return hashlib.sha256(b"mmpeft-rgb %d %d\n" % rgb.size + rgb.tobytes()).hexdigest()


def _checked_size(data: bytes, name: str, max_bytes: int) -> bytes:
    if not data:
        raise ImageError(f"{name!r} is empty (0 bytes); fetch it again or drop the row")
    if len(data) > max_bytes:
        raise ImageError(f"{name!r} has more than {max_bytes:,} bytes; save it smaller")
    return data


def _open(data: bytes) -> Image.Image:
    """The image with its header read and nothing decoded."""
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ImageError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set, so that cut files decode half grey; leave it False"
        )
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError:
        raise ImageError(
            f"no image of a known format (it begins {data[:16]!r}); wanted one of {', '.join(FORMATS)}: "
            "convert it, or drop the row"
        ) from None


def _to_rgb(image: Image.Image, background: tuple[int, int, int], max_pixels: int) -> Image.Image:
    width, height = image.size
    if width < 1 or height < 1 or width * height > max_pixels:
        raise ImageError(f"{width} x {height} pixels; wanted 1 to {max_pixels:,} pixels; scale the image")
    image.load()
    image = _upright(image)
    if image.mode in WIDE_GREY:
        image = _narrow(image)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        rgb = Image.new("RGB", layer.size, background)
        rgb.paste(layer, mask=layer.getchannel("A"))
    else:
        rgb = image.convert("RGB")
    rgb.info = {}  # without it a second load would see the EXIF orientation and turn the image again
    return rgb


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = UPRIGHT.get(int(image.getexif().get(EXIF_ORIENTATION, 1)))
    except Exception:  # damaged EXIF beside good pixels is common; browsers show such an image as stored
        return image
    return image if turn is None else image.transpose(turn)


def _narrow(image: Image.Image) -> Image.Image:
    """Grey of any depth to 8 bits: minimum to 0, maximum to 255, rounded; one single value gives 0."""
    import numpy as np

    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ImageError("the image holds NaN or infinite values; wanted finite pixels; repair or drop it")
    low, span = values.min(), np.ptp(values)
    return Image.fromarray(np.rint((values - low) * (255 / span if span else 0)).astype(np.uint8))

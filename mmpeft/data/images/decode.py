"""The rule by which an image becomes RGB pixels: `load_image`.

Training, batch inference, the server and the demo decode through it, so an image gives the same pixels everywhere.
In order:

1. a format found by content (the name's ending is not trusted), of at most `max_bytes` bytes;
2. the frame that the name or `config.frame` says; which of several was taken is told once a file;
3. at most `max_pixels` pixels, read from the header before anything is decoded;
4. decoded completely (a cut file is an error, never a half-grey image);
5. samples of more than 8 bits to 0..255 by `config.scale`;
6. turned upright by its EXIF orientation, if it has a readable one;
7. to RGB: transparency composed on the background, CMYK and the rest converted by pillow.
"""

import functools
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from mmpeft.data.images import formats
from mmpeft.data.images.config import ImageConfig
from mmpeft.data.images.source import (
    ImageError,
    ImageLike,
    check_pixels,
    read_bytes,
    read_head,
    require_name,
    split_frame,
)
from mmpeft.data.images.upright import turn_of
from mmpeft.files import FileVersion, file_version
from mmpeft.hashing import hash_file

if TYPE_CHECKING:
    from mmpeft.data.images.pillow_file import Decoded

DEFAULT = ImageConfig()
DECODING = b"mmpeft-image 2\n"
"""Part of every key. Counted up when the same file gives other pixels, whose old features must not be found."""


def load_image(image: ImageLike, config: ImageConfig = DEFAULT, *, source: str | None = None) -> Image.Image:
    """The image as a new RGB PIL image, by the rule at the top of this module.

    A PIL image goes through the same rule from step 3 on, at the frame it stands at, and is not changed. The
    result carries no metadata, so loading it again gives the same pixels.

    Args:
        image: A path, which may name a frame (`scan.dcm#frame=3`), encoded bytes, or a PIL image.
        source: Name for error messages, e.g. `"train.jsonl:12"`; default: the path, if there is one.

    Raises:
        ImageError: If any step of the rule fails.
    """
    source = source or (repr(str(image)) if isinstance(image, str | Path) else "image")
    try:
        decoded, turn = _decode(image, config, source)
        return _to_rgb(decoded, turn, config)
    except ImageError as error:
        message = str(error)
        raise ImageError(message if source in message else f"{source}: {message}") from error.__cause__
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"{source}: {error}; wanted at most {config.max_pixels:,}; scale the image down"
        ) from None
    except Exception as error:  # decoders raise nearly any type on hostile bytes
        raise ImageError(
            f"{source}: cannot be decoded ({type(error).__name__}: {error}); wanted a complete, undamaged "
            "image; fetch or save it again, or drop the row"
        ) from error


def image_key(image: ImageLike, config: ImageConfig = DEFAULT) -> str:
    """What an image is by its content, in 64 hex digits: the sha256 of the encoded bytes and of the frame that the name
    says, or of size and RGB pixels for a PIL image.

    The kinds cannot share a key: each is hashed behind a prefix of its own.

    Raises:
        ImageError: a name that cannot be read, an image of too many bytes, or a PIL image that `load_image` refuses.
    """
    if isinstance(image, Image.Image):
        rgb = load_image(image, config)
        return hashlib.sha256(b"mmpeft-rgb %d %d\n" % rgb.size + rgb.tobytes()).hexdigest()
    file, frame = (image, None) if isinstance(image, bytes) else _named(image)
    if frame is None:
        digest = hashlib.sha256(DECODING)
        digest.update(read_bytes(file, max_bytes=config.max_bytes))
        return digest.hexdigest()
    read_head(file)  # which says what is wrong
    of_file = _file_key(str(file), file_version(str(file)))
    return hashlib.sha256(DECODING + f"frame {frame} of {of_file}".encode()).hexdigest()


def _named(image: str | Path) -> tuple[str, int | None]:
    require_name(image)
    return split_frame(image)


@functools.lru_cache(maxsize=256)
def _file_key(file: str, version: FileVersion) -> str:
    """Of files with many frames, such as videos, which are not to be read once a frame."""
    return hash_file(file)


def _decode(image: ImageLike, config: ImageConfig, source: str) -> "tuple[Decoded, Image.Transpose | None]":
    from mmpeft.data.images.pillow_file import (  # numpy, which naming images does not need
        as_samples,
        open_file,
    )

    if isinstance(image, Image.Image):
        check_pixels(image.size, config.max_pixels)
        return as_samples(image), turn_of(image)
    file, frame = (image, None) if isinstance(image, bytes) else _named(image)
    kind = formats.kind_of(read_head(file))
    if kind is formats.VIDEO:
        from mmpeft.data.images.video_file import read_frame

        return read_frame(file, frame, config), None
    data = read_bytes(file, max_bytes=config.max_bytes)
    if kind is formats.HEIC:
        _register_heic()
        return open_file(data, frame, config, source, ("HEIF",))
    if kind is formats.DICOM:
        from mmpeft.data.images.dicom import read_dicom

        return read_dicom(data, frame, config, source), None
    if kind is formats.NIFTI:
        from mmpeft.data.images.nifti import read_slice

        return read_slice(data, frame, config, source), None
    return open_file(data, frame, config, source)


def _register_heic() -> None:
    try:
        import pillow_heif  # pyright: ignore[reportMissingImports] an extra
    except ImportError:
        raise formats.needs_extra(formats.HEIC) from None
    pillow_heif.register_heif_opener()


def _to_rgb(decoded: "Decoded", turn: Image.Transpose | None, config: ImageConfig) -> Image.Image:
    from mmpeft.data.images.depth import to_8_bits

    image = decoded if isinstance(decoded, Image.Image) else to_8_bits(decoded, config.scale)
    if turn is not None:
        image = image.transpose(turn)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        rgb = Image.new("RGB", layer.size, config.background)
        rgb.paste(layer, mask=layer.getchannel("A"))
    else:
        rgb = image.convert("RGB")
    rgb.info = {}  # without it a second load would see the EXIF orientation and turn the image again
    return rgb

"""Image decoding: from a file, bytes or a PIL image to one RGB image, by one rule, `load_image`.

The only room that opens images, scans and videos. `decode.py` has the rule, `formats.py` what is known of a file by its
content, one file each what a family of formats needs, `depth.py` how more than 8 bits become 8.
"""

from mmpeft.data.images.config import ImageConfig
from mmpeft.data.images.decode import image_key, load_image
from mmpeft.data.images.formats import ENDINGS, FORMATS, is_image_file
from mmpeft.data.images.size import image_size
from mmpeft.data.images.source import ImageError, ImageLike, image_file, read_bytes
from mmpeft.data.images.upright import UPRIGHT
from mmpeft.data.images.worker import ImageWorker

__all__ = [
    "ENDINGS",
    "FORMATS",
    "UPRIGHT",
    "ImageConfig",
    "ImageError",
    "ImageLike",
    "ImageWorker",
    "image_file",
    "image_key",
    "image_size",
    "is_image_file",
    "load_image",
    "read_bytes",
]

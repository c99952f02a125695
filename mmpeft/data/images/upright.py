"""EXIF orientation: the turn that makes an image upright."""

from PIL import Image

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


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """The transposition that makes an image upright by its EXIF orientation."""
    try:
        return UPRIGHT.get(int(image.getexif().get(EXIF_ORIENTATION, 1)))
    except Exception:  # damaged EXIF beside good pixels is common; browsers show such an image as stored
        return None

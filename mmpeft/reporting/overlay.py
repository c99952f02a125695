"""An overlay: a heat map's values as colour over a picture that is grey beneath."""

import numpy as np
from PIL import Image, ImageColor

from mmpeft.reporting.canvas import BLUE, WRONG

STRONGEST = 0.8
"""Of the colour, where the value is the largest; the rest is the picture."""
PALE = 0.75
"""How far what has no value is on its way to white."""


def lay_over(picture: Image.Image, heat: np.ndarray, span: tuple[float, float] | None = None) -> Image.Image:
    """The picture at the heat map's size with its values on it, RGB: vermilion above 0, blue below, in proportion to
    the largest. Where none is below 0, the colour goes from the lowest to the highest.

    Args:
        picture: RGB.
        heat: (height, width); NaN where there is no value, which is drawn pale.
        span: the lowest and the highest of all pictures that are looked at together; None is this one's.
    """
    size = heat.shape[1], heat.shape[0]
    seen = ~np.isnan(heat)
    grey = np.asarray(picture.resize(size, Image.Resampling.LANCZOS).convert("L"), np.float64)[..., None]
    strength = np.where(seen, _scaled(heat, span), 0)[..., None]
    colour = np.where(strength < 0, ImageColor.getrgb(BLUE), ImageColor.getrgb(WRONG))
    share = STRONGEST * np.abs(strength)
    pixels = np.where(seen[..., None], grey + share * (colour - grey), grey + PALE * (255 - grey))
    return Image.fromarray(np.rint(pixels).astype(np.uint8), "RGB")


def _scaled(heat: np.ndarray, span: tuple[float, float] | None) -> np.ndarray:
    """-1 to 1."""
    values = heat[~np.isnan(heat)]
    low, high = span or ((values.min(), values.max()) if values.size else (0.0, 0.0))
    if low < 0:
        return (heat / max(-low, high)).clip(-1, 1)
    return ((heat - low) / (high - low)).clip(0, 1) if high > low else np.zeros_like(heat)

"""More than 8 bits: samples as a file stores them, and how they become 0..255 (`image.scale`)."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from mmpeft.data.images.config import parse_scale
from mmpeft.data.images.source import ImageError

ROWS_AT_ONCE = 2**21
"""Samples that are in memory as float64 at a time: an image of 128 million pixels would need gigabytes."""


@dataclass
class Samples:
    """Grey or colour samples whose range says nothing of what is black and white."""

    values: np.ndarray
    """(height, width) or (height, width, 3), of any real dtype; after the file's own rescaling, if it has one."""
    inverted: bool = False
    """Whether low is white (MONOCHROME1, WhiteIsZero)."""
    alpha: np.ndarray | None = None
    """(height, width) uint8; 0 is transparent."""
    window: tuple[float, float] | None = None
    """What the file says is black and white."""


def to_8_bits(samples: Samples, scale: str) -> Image.Image:
    """The samples from black..white to 0..255, rounded and clipped; all channels of colour by the same numbers.

    Where black is white (one single value), what lies above it is white.

    Returns:
        A PIL image of mode L, RGB, LA or RGBA.

    Raises:
        ImageError: samples that are not finite.
    """
    values = samples.values
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ImageError("the image holds NaN or infinite values; wanted finite pixels; repair or drop it")
    black, white = _limits(samples, scale)
    out = np.empty(values.shape, np.uint8)
    step = max(1, ROWS_AT_ONCE // max(1, values[0].size))
    for start in range(0, len(values), step):
        part = values[start : start + step].astype(np.float64) - black
        scaled = part * (255 / (white - black)) if white > black else (part > 0) * 255.0
        out[start : start + step] = np.rint(scaled).clip(0, 255)
    image = Image.fromarray(255 - out if samples.inverted else out)
    if samples.alpha is not None:
        image.putalpha(Image.fromarray(samples.alpha))
    return image


def window_limits(centre: float, width: float) -> tuple[float, float]:
    """Black and white of DICOM's linear window. Source: PS3.3 C.11.2.1.2.1."""
    return centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2


def _limits(samples: Samples, scale: str) -> tuple[float, float]:
    kind, numbers = parse_scale(scale)
    if kind == "fixed":
        return numbers[0], numbers[1]
    if kind == "window":
        return window_limits(*numbers)
    if kind == "file" and samples.window is not None:
        return samples.window
    visible = samples.values if samples.alpha is None else samples.values[samples.alpha > 0]
    if not visible.size:
        return 0.0, 0.0
    if kind == "percentile":
        low, high = np.percentile(visible, (1, 99))
        return float(low), float(high)
    return float(visible.min()), float(visible.max())

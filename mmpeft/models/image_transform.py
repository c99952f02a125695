"""The image transform: RGB image -> pixels of the encoder's size, by its own transform or without its cut."""

import math
from collections.abc import Callable
from typing import Any

from PIL.Image import Image
from timm.data import create_transform
from timm.data.transforms import ResizeKeepRatio
from torch import Tensor

from mmpeft.errors import RefusedError
from mmpeft.models.vision_config import Fit

FITS: dict[Fit, dict[str, Any]] = {
    "crop": {},
    "pad": {"crop_pct": 1.0, "crop_mode": "border"},
    "squash": {"crop_pct": 1.0, "crop_mode": "squash"},
    "tile": {"crop_pct": 1.0, "crop_mode": "squash"},
}
"""What each changes of timm's settings of the evaluation transform; under "tile" it is that of the overview and of
each tile."""
MOST_ENLARGED = 128_000_000
"""Pixels that an image may have after its shorter side has been resized, before the centre is cut out."""


class ResizeInside(ResizeKeepRatio):
    """Of an image that is thinner than a pixel after resizing, one pixel stays."""

    @staticmethod
    def get_params(*args: Any) -> list[int]:
        return [max(1, side) for side in ResizeKeepRatio.get_params(*args)]


def make_transform(data_config: dict[str, Any]) -> Any:
    """timm's evaluation transform of these settings (`timm.data.resolve_model_data_config`)."""
    transform: Any = create_transform(**data_config, is_training=False)
    first = transform.transforms[0]
    if data_config["crop_mode"] == "border":
        transform.transforms[0] = ResizeInside(first.size, first.longest, data_config["interpolation"])
    return transform


def transform_image(
    image: Image, transform: Callable[[Image], Tensor], data_config: dict[str, Any]
) -> Tensor:
    """RGB image -> (3, height, width).

    Raises:
        RefusedError: an image so long that resizing its shorter side would fill the memory.
    """
    height, width = _resized(image.size, data_config)
    if height * width > MOST_ENLARGED:
        raise RefusedError(
            f"an image of {image.width} x {image.height} pixels would be resized to {width:,} x {height:,} before its "
            "centre is cut out; set model.vision.fit to pad, squash or tile, or cut the image into parts"
        )
    return transform(image)


def cut_share(size: tuple[int, int], encoder: Any) -> float:
    """The share of an image's pixels that the encoder's transform cuts off, 0 to 1.

    Args:
        size: (width, height) of the image in pixels.
        encoder: a `VisionEncoder`; of it only `data_config` counts.
    """
    height, width = _resized(size, encoder.data_config)
    _, seen_height, seen_width = encoder.data_config["input_size"]
    return 1 - min(seen_height, height) * min(seen_width, width) / (height * width)


def placed(size: tuple[int, int], data_config: dict[str, Any]) -> tuple[int, int, int, int]:
    """(left, top, width, height) of a resized image among the pixels that the encoder sees; left and top are negative
    where it sticks out and is cut.

    Args:
        size: (width, height) of the image in pixels.
        data_config: timm's settings of the encoder's transform.
    """
    height, width = _resized(size, data_config)
    _, seen_height, seen_width = data_config["input_size"]
    return _start(width, seen_width), _start(height, seen_height), width, height


def _start(side: int, seen: int) -> int:
    """Of the centre cut, or of the padding, as torchvision and timm round it."""
    return (seen - side) // 2 if side < seen else -round((side - seen) / 2)


def _resized(size: tuple[int, int], data_config: dict[str, Any]) -> tuple[int, int]:
    """(height, width) of an image between the resizing and the cut, as timm and torchvision round it."""
    width, height = size
    target_height, target_width = (
        math.floor(side / data_config["crop_pct"]) for side in data_config["input_size"][1:]
    )
    if data_config["crop_mode"] == "squash":
        return target_height, target_width
    ratios = height / target_height, width / target_width
    if data_config["crop_mode"] == "border":
        return max(1, round(height / max(ratios))), max(1, round(width / max(ratios)))
    if target_height != target_width:
        return round(height / min(ratios)), round(width / min(ratios))
    longer = int(target_height * max(size) / min(size))
    return (target_height, longer) if height <= width else (longer, target_height)

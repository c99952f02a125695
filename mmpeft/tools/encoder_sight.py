"""What encoders see of images: what their transforms cut off, and pictures of what is left."""

from collections.abc import Mapping

import torch
from PIL import Image

from mmpeft.models.image_transform import cut_share
from mmpeft.models.tiling import TiledImage
from mmpeft.models.vision import VisionEncoder

MUCH, OFTEN = 0.2, 0.01
"""Shares: of an image's pixels, and of the images, above which a cut is warned of."""
LARGE = 100
"""Times the encoder's size, at which rounding to pixels counts for nothing."""


def cut_warning(encoder: VisionEncoder, sizes: Mapping[tuple[int, int], int]) -> str | None:
    """What to say where the encoder does not see much of many images. What it cuts off of images of its own shape, too,
    is told apart: else those of another shape would not be seen among them.

    Args:
        sizes: (width, height) in pixels -> images.
    """
    _, height, width = encoder.data_config["input_size"]
    border = cut_share((LARGE * width, LARGE * height), encoder)
    shares = {size: cut_share(size, encoder) for size in sizes}
    total = sum(sizes.values())
    cut = sum(count for size, count in sizes.items() if shares[size] > MUCH)
    if cut <= OFTEN * total:
        return None
    by_shape = sum(
        n for size, n in sizes.items() if shares[size] > MUCH < 1 - (1 - shares[size]) / (1 - border)
    )
    (wide, tall), worst = max(shares.items(), key=lambda own: own[1])
    whole = "set model.vision.fit to pad, squash or tile"
    told = f"{encoder.config.name} would not see more than {MUCH:.0%} of the pixels of"
    of_one = f"{worst:.0%} of one of {wide:,} x {tall:,}"
    if border <= MUCH:
        return f"{told} {cut:,} of {total:,} images, and {of_one}: they are cut off; {whole}"
    own = f"it cuts off a border of {border:.0%} even of images of its own shape"
    if not by_shape:
        return f"{told} {cut:,} of {total:,} images: {own}, and of none much more; {whole}"
    return f"{told} {cut:,} of {total:,} images: {own}, and much more of {by_shape:,}, {of_one}; {whole}"


def as_seen(encoder: VisionEncoder, image: Image.Image) -> list[Image.Image]:
    """An RGB image behind the encoder's transform, at its size, in its own colours; its overview and its tiles."""
    mean, std = (torch.tensor(encoder.data_config[name]).view(3, 1, 1) for name in ("mean", "std"))
    seen = encoder.transform(image)
    parts = seen.parts if isinstance(seen, TiledImage) else seen[None]
    pixels = (parts * std + mean).clamp(0, 1).mul(255).round().byte()
    return [Image.fromarray(part.permute(1, 2, 0).numpy()) for part in pixels]

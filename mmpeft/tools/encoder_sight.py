"""What encoders see of images: what their transforms cut off, and pictures of what is left."""

from collections.abc import Mapping

import torch
from PIL import Image

from mmpeft.models.image_transform import cut_share
from mmpeft.models.tiling import TiledImage
from mmpeft.models.vision import VisionEncoder

MUCH, OFTEN = 0.2, 0.01
"""Shares: of an image's pixels, and of the images, above which a cut is warned of."""


def cut_warning(encoder: VisionEncoder, sizes: Mapping[tuple[int, int], int]) -> str | None:
    """What to say where the encoder does not see much of many images.

    Args:
        sizes: (width, height) in pixels -> images.
    """
    shares = {size: cut_share(size, encoder) for size in sizes}
    cut = sum(count for size, count in sizes.items() if shares[size] > MUCH)
    if not cut or cut <= OFTEN * (total := sum(sizes.values())):
        return None
    (width, height), worst = max(shares.items(), key=lambda own: own[1])
    return (
        f"{encoder.config.name} would not see more than {MUCH:.0%} of the pixels of {cut:,} of {total:,} images, and "
        f"{worst:.0%} of one of {width:,} x {height:,}: they are cut off; set model.vision.fit to pad, squash or tile"
    )


def as_seen(encoder: VisionEncoder, image: Image.Image) -> list[Image.Image]:
    """An RGB image behind the encoder's transform, at its size, in its own colours; its overview and its tiles."""
    mean, std = (torch.tensor(encoder.data_config[name]).view(3, 1, 1) for name in ("mean", "std"))
    seen = encoder.transform(image)
    parts = seen.parts if isinstance(seen, TiledImage) else seen[None]
    pixels = (parts * std + mean).clamp(0, 1).mul(255).round().byte()
    return [Image.fromarray(part.permute(1, 2, 0).numpy()) for part in pixels]

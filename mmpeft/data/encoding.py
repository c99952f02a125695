"""Encoding: what the transform made of some images -> their features under a frozen encoder, of which none is NaN or
infinite."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmpeft.data.encoder import Encoder, dtype_name, images_at_once, stacked, tiling_of
from mmpeft.data.images import ImageLike, image_key, load_image
from mmpeft.errors import RefusedError

FEATURE_DTYPE = torch.float16
"""What features are unless the encoder says otherwise, cached or not: rounding both the same way makes cached equal
uncached."""


@torch.no_grad()
def encode(encoder: Encoder, pixels: Sequence[Any], stream: Any = None) -> list[Tensor | RefusedError]:
    """The features of every image from what the encoder's transform made of it, or why they cannot be kept; on a
    ``stream`` of the GPU."""
    with torch.cuda.stream(stream):
        if encoder.num_tokens is None:
            every = [own.to(encoder.feature_dtype) for own in tiling_of(encoder).encode(encoder, pixels)]
            finite = torch.stack([torch.isfinite(own).all() for own in every]).tolist()
            features = [own.cpu() for own in every]
        else:
            together = encoder(torch.stack(list(pixels))).to(encoder.feature_dtype)
            finite = torch.isfinite(together).flatten(1).all(1).tolist()
            features = list(together.cpu())
    refusal = RefusedError(
        f"the vision encoder gave features that are NaN or beyond {dtype_name(encoder)}'s "
        f"{torch.finfo(encoder.feature_dtype).max:.5g}; choose a layer with its norm, or set "
        "model.vision.feature_dtype to bfloat16"
    )
    return [own if fits else refusal for own, fits in zip(features, finite, strict=True)]


def encode_images(
    encoder: Encoder, images: Sequence[ImageLike], batch_size: int = 64
) -> Tensor | list[Tensor]:
    """(images, image tokens, vision dim) in the encoder's `feature_dtype`, or (image tokens, vision dim) of each where
    their number differs, now; an image that comes twice once.

    Raises:
        RefusedError: an image cannot be read, or a feature is too large for it or not a number.
    """
    config = encoder.image_config
    keys = [image_key(image, config) for image in images]
    different = list(dict(zip(keys, images, strict=True)).values())
    parts, batch_size = [], images_at_once(encoder, batch_size)
    for start in range(0, len(different), batch_size):
        chunk = different[start : start + batch_size]
        for own in encode(encoder, [encoder.transform(load_image(image, config)) for image in chunk]):
            if isinstance(own, RefusedError):
                raise own
            parts.append(own)
    places = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    return stacked([parts[places[key]] for key in keys])

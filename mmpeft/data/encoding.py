"""Encoding: the pixels of some images -> their features under a frozen encoder, of which none is NaN or infinite."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from mmpeft.data.images import ImageConfig
from mmpeft.errors import RefusedError

FEATURE_DTYPE = torch.float16
"""What features are unless the encoder says otherwise, cached or not: rounding both the same way makes cached equal
uncached."""


class Encoder(Protocol):
    """What the cache needs of a vision encoder."""

    fingerprint: dict[str, Any]
    image_config: ImageConfig
    num_tokens: int
    dim: int

    @property
    def feature_dtype(self) -> torch.dtype: ...

    def transform(self, image: Any) -> Tensor: ...

    def __call__(self, pixels: Tensor) -> Tensor: ...


@torch.no_grad()
def encode(encoder: Encoder, pixels: Sequence[Tensor], stream: Any = None) -> list[Tensor | RefusedError]:
    """The features of every image from its pixels, or why they cannot be kept; on a ``stream`` of the GPU."""
    with torch.cuda.stream(stream):
        features = encoder(torch.stack(list(pixels))).to(encoder.feature_dtype)
        finite = torch.isfinite(features).flatten(1).all(1).tolist()
        features = features.cpu()
    refusal = RefusedError(
        f"the vision encoder gave features that are NaN or beyond {dtype_name(encoder)}'s "
        f"{torch.finfo(encoder.feature_dtype).max:.5g}; choose a layer with its norm, or set "
        "model.vision.feature_dtype to bfloat16"
    )
    return [own if fits else refusal for own, fits in zip(features, finite, strict=True)]


def dtype_name(encoder: Encoder) -> str:
    """As in the settings."""
    return str(encoder.feature_dtype).removeprefix("torch.")

"""What data needs of a vision encoder, whichever it is."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from mmpeft.data.images import ImageConfig


class Encoder(Protocol):
    """Images -> features. One that cuts images into tiles has a ``tiling`` beside this."""

    fingerprint: dict[str, Any]
    image_config: ImageConfig
    num_tokens: int | None
    """Of every image; None where it depends on an image's shape, as the tiling says."""
    dim: int

    @property
    def feature_dtype(self) -> torch.dtype: ...

    def transform(self, image: Any) -> Any:
        """RGB image -> its pixels (3, height, width), or what the tiling encodes."""
        ...

    def __call__(self, pixels: Tensor) -> Tensor: ...


class Tiling(Protocol):
    """How an encoder cuts images into several of its own."""

    most: int
    """Tiles of an image, beside its overview."""

    @property
    def identity(self) -> list[Any]: ...

    @property
    def most_tokens(self) -> int: ...

    def num_tokens(self, size: tuple[int, int]) -> int:
        """Of an image of (width, height) pixels."""
        ...

    def encode(self, encoder: Any, images: Sequence[Any]) -> list[Tensor]:
        """The features (tokens, dim) of every image, from what the transform made of it."""
        ...


def tiling_of(encoder: Any) -> Tiling:
    """Of an encoder whose images have no one number of tokens."""
    return encoder.tiling


def images_at_once(encoder: Encoder, batch_size: int) -> int:
    """So many images that the encoder gets ``batch_size`` pictures, of which a tiled image is several."""
    return (
        batch_size if encoder.num_tokens is not None else max(1, batch_size // (1 + tiling_of(encoder).most))
    )


def stacked(features: Sequence[Tensor]) -> Tensor | list[Tensor]:
    """(images, image tokens, vision dim) of (image tokens, vision dim) each, where all have as many tokens."""
    alike = len({len(own) for own in features}) == 1
    return torch.stack(list(features)) if alike else list(features)


def dtype_name(encoder: Encoder) -> str:
    """As in the settings."""
    return str(encoder.feature_dtype).removeprefix("torch.")

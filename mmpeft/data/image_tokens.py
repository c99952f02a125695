"""How many tokens an image is: as many as any other, or as its shape says where an encoder cuts images into tiles."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL.Image import Image

from mmpeft.data.encoder import Encoder, Tiling, tiling_of
from mmpeft.data.images import ImageConfig, ImageLike, image_file, image_size, load_image
from mmpeft.files import FileVersion, file_version

Decode = Callable[[ImageLike, ImageConfig], Image]
KNOWN = 2**16
"""Files whose size in pixels is remembered."""


class TokensByShape:
    """Image -> its tokens.

    Args:
        tiling: of the encoder.
        config: how images are read.
    """

    def __init__(self, tiling: Tiling, config: ImageConfig):
        self.tiling, self.config = tiling, config
        self.decode: Decode = load_image
        """What reads an image whose header does not tell its size; see `ImageEncoding.decode`."""
        self._of_file = lru_cache(KNOWN)(self._of_version)

    def __call__(self, image: ImageLike) -> int:
        """Raises:
        ImageError: it cannot be read.
        """
        if isinstance(image, str | Path) and (version := version_of(image)) is not None:
            return self._of_file(str(image), version)
        return self._count(image)

    @property
    def identity(self) -> list[Any]:
        """All that decides how many there are of a file."""
        return [self.tiling.identity, self.config.identity]

    def _of_version(self, image: str, version: FileVersion) -> int:
        return self._count(image)

    def _count(self, image: ImageLike) -> int:
        return self.tiling.num_tokens(image_size(image, self.config, self.decode))


ImageTokens = int | TokensByShape
"""Of every image, or what tells them of one."""


def image_tokens(encoder: Encoder) -> ImageTokens:
    """Of a vision encoder, or of none."""
    if encoder.num_tokens is not None:
        return encoder.num_tokens
    return TokensByShape(tiling_of(encoder), encoder.image_config)


def version_of(image: str | Path) -> FileVersion | None:
    """Of an image's file; None where there is none."""
    try:
        return file_version(image_file(image))
    except (OSError, ValueError):
        return None

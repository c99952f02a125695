"""Tiles: an image of any shape as a grid of the encoder's squares behind an overview, LLaVA-NeXT's AnyRes.

::

    a panorama  -->  overview, squashed into a square     g x g tokens
                     tile | tile | tile                   the grid's tokens row by row, as of one picture,
                                                          without the rows and columns that are padding alone

Of all grids of at most ``most`` tiles an image gets the one in which most of its pixels are kept, of several the one
with the least padding (`select_best_resolution`); it is scaled into it and padded with the mean colour. A grid of one
tile is the overview alone. With 4 tiles these are LLaVA-NeXT's grids: 2x2, 1x2 to 1x4, 2x1 to 4x1.

Nothing marks the end of a row. LLaVA-NeXT learns an embedding for that (``image_newline``), a weight beside the
projector that the files of our finetunes do not have; InternVL's tiles do without.

Source: LLaVA-NeXT (https://llava-vl.github.io/blog/2024-01-30-llava-next/), ``mm_utils.py`` and ``llava_arch.py``
(``spatial_unpad``), which drops up to half a token's height of the picture on either side where we keep it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from PIL.Image import Resampling
from torch import Tensor

from mmpeft.errors import RefusedError

Size = tuple[int, int]
"""(width, height) in pixels."""


@dataclass(frozen=True)
class TiledImage:
    """An image as the encoder sees it."""

    parts: Tensor
    """(1 + tiles, 3, side, side): the overview, then the tiles in reading order."""
    size: Size
    """Of the image."""


class Tiling:
    """Cuts images into tiles, and puts their tokens together.

    Args:
        data_config: timm's settings of the encoder's transform.
        transform: RGB image -> (3, side, side), which squashes.
        num_tokens: of one square.
        most: tiles that an image may have.

    Raises:
        RefusedError: the encoder's images or its tokens are no squares.
    """

    def __init__(
        self,
        data_config: dict[str, Any],
        transform: Callable[[Image.Image], Tensor],
        num_tokens: int,
        most: int,
    ):
        _, height, self.side = data_config["input_size"]
        self.cells = round(num_tokens**0.5)
        if height != self.side or self.cells**2 != num_tokens:
            raise RefusedError(
                f"model.vision.fit is tile, but the encoder makes {num_tokens} tokens of {height}x{self.side} pixels; "
                "wanted squares of both: choose another encoder or pooling, or set fit to pad"
            )
        self.most, self._transform = most, transform
        self._resample = Resampling[data_config["interpolation"].upper()]
        self._fill = tuple(round(255 * value) for value in data_config["mean"])

    @property
    def told(self) -> str:
        """What it does, for the identity of an encoder."""
        return f"an overview, then the best grid of 2 to {self.most} tiles without its padding, rows without a mark"

    @property
    def identity(self) -> list[Any]:
        """All that decides how many tokens an image of a size has."""
        return [self.told, self.side, self.cells]

    @property
    def most_tokens(self) -> int:
        """Tokens of an image that fills the largest grid."""
        return (1 + self.most) * self.cells**2

    def cut(self, image: Image.Image) -> TiledImage:
        """RGB image -> what the encoder gets of it."""
        rows, columns = self.grid(image.size)
        parts = [image]
        if rows * columns > 1:
            (left, top), content = self._content(image.size, (rows, columns))
            whole = Image.new("RGB", (columns * self.side, rows * self.side), self._fill)
            whole.paste(image.resize(content, self._resample), (left, top))
            parts += [
                whole.crop((x, y, x + self.side, y + self.side))
                for y in range(0, whole.height, self.side)
                for x in range(0, whole.width, self.side)
            ]
        return TiledImage(torch.stack([self._transform(part) for part in parts]), image.size)

    def encode(self, encoder: Callable[[Tensor], Tensor], images: Sequence[TiledImage]) -> list[Tensor]:
        """The features (tokens, dim) of every image.

        Args:
            encoder: (squares, 3, side, side) -> (squares, tokens, dim).
        """
        features = encoder(torch.cat([image.parts for image in images]))
        each = features.split([len(image.parts) for image in images])
        return [self._arranged(own, image.size) for own, image in zip(each, images, strict=True)]

    def num_tokens(self, size: Size) -> int:
        """Of an image of so many pixels."""
        rows, columns = self._seen(size, self.grid(size))
        tiles = (rows.stop - rows.start) * (columns.stop - columns.start)
        return self.cells**2 + tiles

    def placed(self, size: Size) -> tuple[Size, Size, slice, slice] | None:
        """Where an image of so many pixels lies in its grid of tiles: (left, top) and (width, height) in pixels of the
        grid, and the rows and columns of the grid's tokens that it has behind its overview; None of an overview
        alone."""
        grid = self.grid(size)
        return None if grid == (1, 1) else (*self._content(size, grid), *self._seen(size, grid))

    def grid(self, size: Size) -> tuple[int, int]:
        """(rows, columns) of the best grid."""
        every = [
            (rows, columns) for rows in range(1, self.most + 1) for columns in range(1, self.most // rows + 1)
        ]
        return max(every, key=lambda grid: self._merit(size, grid))

    def _merit(self, size: Size, grid: tuple[int, int]) -> tuple[int, int]:
        """Pixels of the image that are kept; those of the grid that are none of them, as a loss."""
        (width, height), (rows, columns) = size, grid
        whole_width, whole_height = columns * self.side, rows * self.side
        fitting_height = min(whole_height, height * whole_width // width)
        fitting_width = min(whole_width, width * whole_height // height)
        kept = min(fitting_width * fitting_height, width * height)
        return kept, kept - whole_width * whole_height

    def _content(self, size: Size, grid: tuple[int, int]) -> tuple[Size, Size]:
        """(left, top) of the image in its grid, and its (width, height) there."""
        (width, height), (rows, columns) = size, grid
        whole_width, whole_height = columns * self.side, rows * self.side
        scaled_width = min(whole_width, -(-width * whole_height // height))
        scaled_height = min(whole_height, -(-height * whole_width // width))
        return ((whole_width - scaled_width) // 2, (whole_height - scaled_height) // 2), (
            scaled_width,
            scaled_height,
        )

    def _seen(self, size: Size, grid: tuple[int, int]) -> tuple[slice, slice]:
        """The rows and columns of the grid's tokens in which something of the image lies; none of an overview alone."""
        if grid == (1, 1):
            return slice(0, 0), slice(0, 0)
        (left, top), (width, height) = self._content(size, grid)
        return self._tokens_over(top, height), self._tokens_over(left, width)

    def _tokens_over(self, start: int, length: int) -> slice:
        return slice(start * self.cells // self.side, -(-(start + length) * self.cells // self.side))

    def _arranged(self, features: Tensor, size: Size) -> Tensor:
        """(1 + tiles, tokens, dim) -> (tokens of the image, dim)."""
        overview, tiles = features[0], features[1:]
        if not len(tiles):
            return overview
        rows, columns = self.grid(size)
        picture = (
            tiles.view(rows, columns, self.cells, self.cells, -1).transpose(1, 2).flatten(0, 1).flatten(1, 2)
        )
        seen = self._seen(size, (rows, columns))
        return torch.cat([overview, picture[seen].flatten(0, 1)])

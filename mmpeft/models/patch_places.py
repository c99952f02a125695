"""Where the tokens of an image lie in the picture: patches as boxes of its pixels, through pooling, crop, padding and
tiles.

::

    picture --resize--> content --cut, pad--> the encoder's pixels --> grid of patches --pool--> tokens

A patch is where a token comes from, not all that it knows: layers of an encoder mix what lies side by side.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmpeft.models.image_transform import placed
from mmpeft.models.pooling import cells_of_tokens
from mmpeft.models.tiling import Size
from mmpeft.models.vision import VisionEncoder

Edges = tuple[np.ndarray, np.ndarray]
"""Where each of several neighbours begins and ends, in pixels."""


@dataclass(frozen=True)
class PatchPlaces:
    """The patches of one picture. A token is one of them or, pooled, several; a tiled picture has them twice, in the
    overview and in the tiles."""

    size: Size
    """(width, height) of the picture in pixels."""
    boxes: np.ndarray
    """(patches, 4) float64: left, top, right and bottom in pixels of the picture; beyond its borders where the encoder
    sees padding."""
    tokens: np.ndarray
    """(patches,) int64: the token that each belongs to."""

    def heat(self, values: np.ndarray, size: Size) -> np.ndarray:
        """Values of the tokens spread over their patches, (height, width) float64 a pixel of the picture at another
        size; NaN where the encoder sees nothing of it.

        Args:
            values: (tokens,)
            size: (width, height) in pixels.
        """
        drawn = np.array([*size, *size])
        edges = np.rint(self.boxes * drawn / [*self.size, *self.size]).astype(int).clip(0, drawn)
        densities = values[self.tokens] / self._patches_of_token[self.tokens] / _areas(self.boxes)
        heat, seen = np.zeros((size[1], size[0])), np.zeros((size[1], size[0]), bool)
        for (left, top, right, bottom), density in zip(edges, densities, strict=True):
            heat[top:bottom, left:right] += density
            seen[top:bottom, left:right] = True
        return np.where(seen, heat, np.nan)

    def inside(self) -> np.ndarray:
        """(tokens,) the share of each that lies in the picture and not in padding."""
        cut = self.boxes.clip(0, [*self.size, *self.size])
        shares = _areas(cut) / _areas(self.boxes)
        return np.bincount(self.tokens, shares) / self._patches_of_token

    @property
    def _patches_of_token(self) -> np.ndarray:
        return np.bincount(self.tokens)


def patch_places(encoder: VisionEncoder, size: Size) -> PatchPlaces:
    """Where the encoder's tokens of a picture of (width, height) pixels lie, in the order of the tokens."""
    left, top, *content = placed(size, encoder.data_config)
    cells = cells_of_tokens(encoder.grid, encoder.config.pooling, encoder.config.pool)
    seen = _boxes(*_edges_of_square(encoder))[cells.flatten()]
    boxes = _in_picture(seen, (left, top), content, size)
    tokens = np.arange(len(cells)).repeat(cells.shape[1])
    tiles = None if encoder.tiling is None else encoder.tiling.placed(size)
    if encoder.tiling is None or tiles is None:
        return PatchPlaces(size, boxes, tokens)
    start, content, *shown = tiles
    pool = encoder.grid[0] // encoder.tiling.cells
    own = [(begins[::pool], ends[pool - 1 :: pool]) for begins, ends in _edges_of_square(encoder)]
    in_tiles = _boxes(
        *(_repeated(each, which, encoder.tiling.side) for each, which in zip(own, shown, strict=True))
    )
    more = len(cells) + np.arange(len(in_tiles))
    in_tiles = _in_picture(in_tiles, start, content, size)
    return PatchPlaces(size, np.concatenate([boxes, in_tiles]), np.concatenate([tokens, more]))


def _edges_of_square(encoder: VisionEncoder) -> tuple[Edges, Edges]:
    """Of the rows and the columns of the encoder's grid, in its pixels."""
    step = encoder.model.feature_info[encoder.layer].get("reduction")
    down, across = (
        _edges(count, side, step)
        for count, side in zip(encoder.grid, encoder.data_config["input_size"][1:], strict=True)
    )
    return down, across


def _edges(count: int, side: int, step: float | None) -> Edges:
    """Of cells of ``step`` pixels, of which the last may be cut off or leave a border; of equal parts where that is not
    how the model divides its pixels."""
    if step is None or abs(count * step - side) >= step:
        step = side / count
    borders = np.minimum(np.arange(count + 1) * step, side)
    return borders[:-1], borders[1:]


def _repeated(square: Edges, which: slice, side: int) -> Edges:
    """Of some cells of a row of squares, counted through all squares."""
    tile, cell = np.divmod(np.arange(which.start, which.stop), len(square[0]))
    return tile * side + square[0][cell], tile * side + square[1][cell]


def _boxes(down: Edges, across: Edges) -> np.ndarray:
    """(rows times columns, 4) of the cells in reading order."""
    top, left = np.meshgrid(down[0], across[0], indexing="ij")
    bottom, right = np.meshgrid(down[1], across[1], indexing="ij")
    return np.stack([left, top, right, bottom], -1).reshape(-1, 4)


def _in_picture(boxes: np.ndarray, start: Size, content: Sequence[int], size: Size) -> np.ndarray:
    """Boxes among pixels where the resized picture begins at ``start`` and is as large as ``content``, in pixels of the
    picture."""
    return (boxes - [*start, *start]) * (np.array([*size, *size]) / [*content, *content])


def _areas(boxes: np.ndarray) -> np.ndarray:
    left, top, right, bottom = boxes.T
    return (right - left) * (bottom - top)

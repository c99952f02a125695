"""Pooling of patch features: which neighbours of the encoder's grid become one token, in which order."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmpeft.errors import RefusedError
from mmpeft.models.vision_config import Pooling


def pool_tokens(features: Tensor, pooling: Pooling, pool: int) -> Tensor:
    """(images, dim, height, width) -> (images, tokens, dim'), rows of the grid one after the other.

    Raises:
        RefusedError: the grid does not divide.
    """
    _, dim, height, width = features.shape
    run = pool if pooling == "consecutive" else 1
    side = pool if pooling in ("average", "pixel_shuffle") else 1
    if height % side or width % side or (height * width) % run:
        raise RefusedError(
            f"a grid of {height}x{width} tokens cannot be pooled by {pool} ({pooling}); change image_size or pool"
        )
    if pooling == "average":
        features = F.avg_pool2d(features, pool)
    elif pooling == "pixel_shuffle":
        features = F.pixel_unshuffle(features, pool)
    tokens = features.flatten(2).transpose(1, 2)
    return tokens.reshape(len(tokens), -1, dim * pool) if pooling == "consecutive" else tokens.contiguous()


def cells_of_tokens(grid: tuple[int, int], pooling: Pooling, pool: int) -> np.ndarray:
    """(tokens, cells of each) int64: the cells of a grid (rows, columns) that `pool_tokens` makes each token of, as
    their numbers in reading order."""
    numbers = torch.arange(grid[0] * grid[1], dtype=torch.float64).view(1, 1, *grid)
    kept: Pooling = (
        "pixel_shuffle" if pooling == "average" else pooling
    )  # of the same squares, but side by side
    return pool_tokens(numbers, kept, pool)[0].long().numpy()

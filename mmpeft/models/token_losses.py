"""Token losses (cross-entropy) of a batch's labels, and the scores of rank classification made of them.

Source of rank classification: Liu et al. 2022 (T-Few), section 3.2: ``beta(x, y) = 1/T sum_t log p(y_t | x, y_<t)``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mmpeft.data.packing import PREFIX


@dataclass
class TokenLosses:
    """Negative log-likelihoods of the labelled tokens of a batch, in reading order."""

    nll: Tensor
    """(labelled,) float32"""
    correct: Tensor
    """(labelled,) bool: whether the label was the most likely token."""
    rows: Tensor
    """(labelled,) int64"""
    segments: Tensor
    """(labelled,) int64"""

    def where(self, mask: Tensor) -> "TokenLosses":
        """Those of the tokens that ``mask`` (labelled,) bool picks."""
        return TokenLosses(self.nll[mask], self.correct[mask], self.rows[mask], self.segments[mask])


def length_normalised(losses: TokenLosses, num_rows: int) -> Tensor:
    """The mean log-probability of every conversation's labelled tokens, the end token among them.

    Returns:
        (rows, most conversations of a row) float32, ``-inf`` where a row has fewer.
    """
    columns = losses.segments - PREFIX - 1
    width = int(columns.max()) + 1 if len(columns) else 0
    place = losses.rows * width + columns
    counts = torch.bincount(place, minlength=num_rows * width)
    totals = losses.nll.new_zeros(num_rows * width).index_add(0, place, -losses.nll)
    means = torch.where(counts > 0, totals / counts.clamp(min=1), -torch.inf)
    return means.view(num_rows, width)

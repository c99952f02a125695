"""Token losses (cross-entropy) of a batch's labels, and the scores of rank classification made of them.

Source of rank classification: Liu et al. 2022 (T-Few), section 3.2: ``beta(x, y) = 1/T sum_t log p(y_t | x, y_<t)``.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmpeft.data.packing import PREFIX
from mmpeft.transfer import to_device


@dataclass
class TokenLosses:
    """Negative log-likelihoods of the labelled tokens of a batch, in reading order."""

    nll: Tensor
    """(labelled,) float32"""
    correct: Tensor
    """(labelled,) bool: whether the label was the most likely token."""
    rows: np.ndarray
    """(labelled,) int64, on the host"""
    segments: np.ndarray
    """(labelled,) int64, on the host"""

    @classmethod
    def of_none(cls, nll: Tensor) -> "TokenLosses":
        """Those of a batch without rows, ``nll`` (0,)."""
        nowhere = np.zeros(0, np.int64)
        return cls(nll, torch.zeros(0, dtype=torch.bool, device=nll.device), nowhere, nowhere)

    def where(self, mask: np.ndarray) -> "TokenLosses":
        """Those of the tokens that ``mask`` (labelled,) bool picks."""
        if mask.all():
            return self
        places = to_device(mask.nonzero()[0], self.nll.device)
        nll, correct = self.nll.index_select(0, places), self.correct.index_select(0, places)
        return TokenLosses(nll, correct, self.rows[mask], self.segments[mask])


def length_normalised(losses: TokenLosses, num_rows: int) -> Tensor:
    """The mean log-probability of every conversation's labelled tokens, the end token among them.

    Returns:
        (rows, most conversations of a row) float32, ``-inf`` where a row has fewer.
    """
    columns = losses.segments - PREFIX - 1
    width = int(columns.max()) + 1 if len(columns) else 0
    place = losses.rows * width + columns
    device = losses.nll.device
    counts = to_device(np.bincount(place, minlength=num_rows * width), device)
    totals = losses.nll.new_zeros(num_rows * width).index_add(0, to_device(place, device), -losses.nll)
    means = torch.where(counts > 0, totals / counts.clamp(min=1), -torch.inf)
    return means.view(num_rows, width)

"""Metrics as functions of sums over rows: those of a thousand draws of the rows cost one product of matrices.

numpy comes in only where intervals are made: metrics alone do without.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from numpy import float64
    from numpy.typing import NDArray

Numbers: TypeAlias = "NDArray[float64]"


class Sums(NamedTuple):
    """A metric of a set of answers: what each adds up, and what the metric makes of such sums."""

    rows: Numbers
    """(answers, numbers)"""
    values: Callable[[Numbers], dict[str, Numbers]]
    """(draws, numbers), summed over the answers of each draw -> the metric's values by name, "" for the only one,
    (draws,) each; nan where a draw has none."""
    are_shares: bool = False
    """Whether the metric is a mean of scores from 0 to 1, or of a share of the answers."""


def mean_of(scores: Sequence[float], are_shares: bool) -> Sums:
    """The mean over rows."""
    import numpy as np

    rows = np.stack([np.asarray(scores, float), np.ones(len(scores))], axis=1)
    return Sums(rows, lambda sums: {"": sums[:, 0] / sums[:, 1]}, are_shares)


def quotient(above: Numbers, below: Numbers) -> Numbers:
    """``above / below``, 0 where that is not defined."""
    import numpy as np

    return np.divide(above, below, out=np.zeros_like(above, dtype=float), where=below != 0)

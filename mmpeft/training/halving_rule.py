"""The rule of successive halving: how many settings go on after which steps, and which setting is the best.

Source: Jamieson and Talwalkar 2016, "Non-stochastic Best Arm Identification and Hyperparameter Optimization", figure 3.
"""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from statistics import fmean

from mmpeft.errors import RefusedError

CURVE = "val_loss"


def num_halvings(settings: int, keep: float) -> int:
    """After how many halvings one setting is left."""
    number = 0
    while settings > 1:
        settings, number = num_kept(settings, keep), number + 1
    return number


def num_kept(settings: int, keep: float) -> int:
    """How many of them go on: ``keep`` of them rounded up, but one less at least."""
    # as written: 10 * 0.7 is a little more than 7 in binary
    return min(settings - 1, math.ceil(settings * Fraction(str(keep))))


def halving_steps(settings: int, keep: float, steps: int) -> list[int]:
    """After which of ``steps`` the settings are halved: at last after ``keep`` of them, before that after ``keep`` of
    those, and so on: the fewer settings are left, the longer they go.

    Raises:
        RefusedError: too few steps for so many halvings.
    """
    number = num_halvings(settings, keep)
    at = [round(steps * keep**left) for left in range(number, 0, -1)]
    if len({0, *at, steps}) < len(at) + 2:
        raise RefusedError(
            f"{settings} settings are halved {number} times, for which {steps} steps are too few: set "
            "trainer.max_steps higher, or say yourself after which steps"
        )
    return at


def check_steps(at: Sequence[int], steps: int) -> None:
    """Raises:
    RefusedError: the steps after which to halve are not in order, or not before the end.
    """
    if list(at) != sorted(set(at)) or (at and not 0 < at[0] <= at[-1] < steps):
        raise RefusedError(
            f"the settings are to be halved after the steps {list(at)} of {steps}; give them in order, each "
            "before the end"
        )


def mean_loss(losses: Sequence[float]) -> float:
    """Of a setting's finetunes; one that diverged makes it the worst."""
    return fmean(losses) if all(map(math.isfinite, losses)) else math.inf


def standings(
    curves: Mapping[str, Sequence[tuple[float, float]]], settings: Mapping[str, Sequence[str]]
) -> list[tuple[str, int, float]]:
    """(setting, its last validated step, mean loss there), the best first: those that went on longest, by their loss.

    Args:
        curves: name -> (step, value) in order, as the run's metrics.csv has them.
        settings: setting -> its finetunes.
    """
    found = []
    for setting, names in settings.items():
        last = [curves[f"{CURVE}/{name}"][-1] for name in names]
        found.append((setting, int(last[0][0]) + 1, mean_loss([loss for _, loss in last])))
    return sorted(found, key=lambda own: (-own[1], own[2]))

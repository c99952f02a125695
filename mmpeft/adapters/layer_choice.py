"""Which decoder layers a config means by ``layers``: numbers, ranges and shares."""

import math
import re
from collections.abc import Sequence
from fractions import Fraction

from mmpeft.errors import RefusedError


def choose_layers(num_layers: int, layers: Sequence[int] | str | None) -> list[int]:
    """Numbers of the chosen decoder layers, ascending.

    ``None`` is all of them. A list counts from 0, or from the end where negative. ``"8-15"`` has both ends,
    ``"8:"``, ``":8"`` and ``"8:16"`` are Python's slices. ``"last 50%"``, ``"first 25%"`` and ``"middle 1/3"`` are
    shares, rounded to the nearest layer and at least one.

    Raises:
        RefusedError: a layer that is not there, the same one twice, or a word that is none of these.
    """
    if layers is None:
        return list(range(num_layers))
    if isinstance(layers, str):
        return _by_words(num_layers, layers.strip())
    wrong = [
        n
        for n in layers
        if isinstance(n, bool) or not isinstance(n, int) or not -num_layers <= n < num_layers
    ]
    if wrong or not layers:
        raise RefusedError(
            f"layers {list(layers)!r}: {wrong or 'nothing'} names no layer; the model has {num_layers}, numbered "
            f"0 to {num_layers - 1}, or -{num_layers} to -1 from the end"
        )
    chosen = sorted(n % num_layers for n in layers)
    if len(set(chosen)) < len(chosen):
        raise RefusedError(
            f"layers {list(layers)!r} names a layer twice in a model of {num_layers}; name each once"
        )
    return chosen


def _by_words(num_layers: int, words: str) -> list[int]:
    if match := re.fullmatch(r"(\d+)\s*-\s*(\d+)", words):
        first, stop = int(match[1]), int(match[2]) + 1
    elif match := re.fullmatch(r"(\d*):(\d*)", words):
        first, stop = int(match[1] or 0), int(match[2] or num_layers)
    elif match := re.fullmatch(
        r"(first|middle|last)\s+(?:(\d+(?:\.\d+)?)\s*%|(\d+)\s*/\s*([1-9]\d*))", words
    ):
        share = Fraction(match[2]) / 100 if match[2] else Fraction(int(match[3]), int(match[4]))
        if not 0 < share <= 1:
            raise RefusedError(f"layers {words!r}: a share must be above 0 and at most 100% or 1/1")
        count = max(1, math.floor(share * num_layers + Fraction(1, 2)))
        first = {"first": 0, "middle": (num_layers - count) // 2, "last": num_layers - count}[match[1]]
        stop = first + count
    else:
        raise RefusedError(
            f"layers {words!r} is not understood; write a list such as [0, 1, -1], a range such as '8-15' or '8:', "
            "or a share such as 'last 50%', 'first 25%' or 'middle 1/3'"
        )
    if not 0 <= first < stop <= num_layers:
        raise RefusedError(
            f"layers {words!r} names layers {first} to {stop - 1}; the model has {num_layers}, numbered 0 to "
            f"{num_layers - 1}"
        )
    return list(range(first, stop))

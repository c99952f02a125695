"""Floating-point operations, counted while a computation runs.

The figure that papers give is that of `products`: 2 m k n for a product of (m, k) and (k, n), and the like for
convolutions. Additions and multiplications number by number stand apart; of some adapters they are all there is.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten


@dataclass(frozen=True)
class Operations:
    """What a computation took."""

    products: float = 0
    """Operations of matrix products and convolutions."""
    elementwise: float = 0
    """Additions, subtractions, multiplications and divisions number by number."""

    @property
    def total(self) -> float:
        return self.products + self.elementwise

    def __add__(self, other: "Operations") -> "Operations":
        return Operations(self.products + other.products, self.elementwise + other.elementwise)

    def __sub__(self, other: "Operations") -> "Operations":
        return self + -1 * other

    def __rmul__(self, factor: float) -> "Operations":
        return Operations(factor * self.products, factor * self.elementwise)


def count_operations(action: Callable[[], Any]) -> Operations:
    """Runs ``action`` once, backward passes in it included, and counts. Shapes decide, values do not.

    Products inside operators that are not PyTorch's own, such as those of bitsandbytes, are not seen.
    """
    with FlopCounterMode(display=False, custom_mapping={**_IN_PLACE, **_ELEMENTWISE}) as counter:
        action()
    counts = counter.get_flop_counts().get("Global", {})
    elementwise = sum(count for operator, count in counts.items() if operator in _ELEMENTWISE)
    return Operations(sum(counts.values()) - elementwise, elementwise)


def _product(_: Any, left: torch.Size, right: torch.Size, **__: Any) -> int:
    return 2 * math.prod(left) * right[-1]


def _per_number(operations: int) -> Callable[..., int]:
    def count(*_: Any, out_shape: torch.Size, **__: Any) -> int:
        return operations * math.prod(out_shape)

    return count


# PyTorch's counter (2.15) has no formula for the forms that write into an operand and passes them over.
_IN_PLACE = {aten.addmm_: _product, aten.baddbmm_: _product}
_ELEMENTWISE = {
    getattr(aten, name + form): _per_number(operations)
    for name, operations in {"add": 1, "sub": 1, "mul": 1, "div": 1, "addcmul": 2}.items()
    for form in ("", "_")
}

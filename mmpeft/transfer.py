"""Between host and device: there without waiting for what the device still has to do, and back with one wait; and
between processes that each hold a part of a tensor."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def to_device(values: Any, device: torch.device | str, dtype: torch.dtype = torch.int64) -> Tensor:
    """A list, array or tensor as a tensor of ``dtype`` there; ``torch.tensor(values, device=device)`` would wait until
    a CUDA device has done all that it was asked for."""
    return torch.as_tensor(values, dtype=dtype).to(device, non_blocking=True)


def to_host(values: Sequence[Tensor | float]) -> list[float]:
    """Numbers, of which those on the device are waited for once, all together."""
    there = [value.detach().float() for value in values if isinstance(value, Tensor)]
    told = iter(torch.stack(there).tolist() if there else [])
    return [next(told) if isinstance(value, Tensor) else value for value in values]


def is_sharded(tensor: Any) -> bool:
    """Whether processes hold a part of a tensor each (torch's DTensor); its shape is that of the whole."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> Tensor:
    """A tensor, or all of one that `is_sharded`: every process must ask for it, and gets it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor

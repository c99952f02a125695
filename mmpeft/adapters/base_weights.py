"""The weight of a frozen linear, dense or quantised to 4 or 8 bits by bitsandbytes, read as dense (dequantised).

===== ========================================== ===================================================
held  codes                                      weight
===== ========================================== ===================================================
4-bit two in a byte, the first in its upper half ``code[c] * absmax`` of the block that it lies in
8-bit int8                                       ``c * SCB / 127`` with SCB of its row
===== ========================================== ===================================================
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmpeft.errors import RefusedError
from mmpeft.transfer import is_sharded, whole


def read_weight(path: str, linear: Any) -> Tensor:
    """The weight (O, I) that a linear computes with, in fp32; not to be written to.

    Args:
        path: what errors call the linear.
        linear: of torch, transformers (Conv1D) or bitsandbytes.

    Raises:
        RefusedError: bitsandbytes has repacked it for inference.
    """
    if is_4bit(linear):
        check_not_packed(path, linear)
        return _decode_4bit(linear)
    if is_quantised(linear):
        return linear.weight.detach().float() * (row_scales(linear).float() / 127)[:, None]
    return dense_weight(linear).detach().float()


def dense_weight(linear: nn.Module) -> Tensor:
    """The weight (O, I) of a dense linear itself, or of an embedding, whose inputs are its tokens; a view where they
    keep it as (I, O)."""
    weight: Any = linear.weight
    return weight.T if is_transposed(linear) else weight


@contextmanager
def gathered(linear: Any) -> Iterator[None]:
    """Inside, a linear has all of its weight, also where processes hold a part of it each; all of them must ask. In a
    forward they have it anyway."""
    weight = linear.weight
    if not is_sharded(weight):
        yield
        return
    linear._parameters["weight"] = nn.Parameter(whole(weight.detach()), requires_grad=False)
    try:
        yield
    finally:
        linear._parameters["weight"] = weight


def is_transposed(linear: nn.Module) -> bool:
    """Whether the weight is kept as (I, O): by Conv1D and embeddings."""
    return type(linear).__name__ == "Conv1D" or isinstance(linear, nn.Embedding)


def is_4bit(linear: Any) -> bool:
    """Whether the weight is 4-bit codes, which may be stored in the bytes of any dtype."""
    return getattr(linear.weight, "quant_state", None) is not None


def is_quantised(linear: Any) -> bool:
    """Whether the weight is codes of 4 or 8 bits; 8-bit ones are int8."""
    return is_4bit(linear) or linear.weight.dtype == torch.int8


def check_not_packed(path: str, linear: Any) -> None:
    """Raises:
    RefusedError: a 4-bit weight that bitsandbytes has repacked for inference, and its scales rounded.
    """
    if is_4bit(linear) and getattr(linear.weight.quant_state, "packing_format_for_cpu", False):
        raise RefusedError(
            f"bitsandbytes has repacked {path} for inference and rounded its scales: load the model afresh and set "
            "support_avx512bf16_for_cpu = False on its Linear4bit modules before any forward"
        )


def block_scales(state: Any) -> Tensor:
    """The absmax (blocks,) of every block of a 4-bit weight, in fp32; under double quantisation, decoded."""
    absmax = state.absmax
    if state.nested:
        outer = state.state2
        absmax = outer.code[absmax.long()] * outer.absmax.repeat_interleave(outer.blocksize)[: len(absmax)]
        absmax = absmax + state.offset
    return absmax.float()


def row_scales(linear: Any) -> Tensor:
    """SCB (O,) of an 8-bit weight, itself; bitsandbytes moves it from the weight to the state at first use."""
    return linear.state.SCB if linear.weight.SCB is None else linear.weight.SCB


def _decode_4bit(linear: Any) -> Tensor:
    state = linear.weight.quant_state
    code = state.code.float()
    pairs = torch.cartesian_prod(code, code)  # (256, 2): what a byte holds
    stored = linear.weight.detach().contiguous().view(torch.uint8).flatten()
    numbers = pairs[stored.int()].flatten()[: math.prod(state.shape)]
    scales = block_scales(state).repeat_interleave(state.blocksize)[: len(numbers)]
    return (numbers * scales).view(state.shape)

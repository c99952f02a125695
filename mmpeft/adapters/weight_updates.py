"""Updates of a frozen linear's weight and bias, which a merge consists of: sums on dense weights, scalings on any.

Dense weights change in fp32 and are rounded to their dtype once, see `rounded_once`. Of a quantised weight the rows
can be scaled exactly, by its scales alone; adding to it would mean quantising it anew.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmpeft.adapters.base_weights import (
    block_scales,
    check_not_packed,
    dense_weight,
    is_4bit,
    is_quantised,
    row_scales,
)
from mmpeft.errors import RefusedError

DEQUANTIZE_FIRST = (
    "make the base dense first (`mmpeft merge` without --quantization, of a checkpoint that is dense on disk)"
)


def check_dense(path: str, linear: nn.Module, method: str) -> None:
    """Raises:
    RefusedError: the linear is quantised, so that no update can be added to its weight.
    """
    if is_quantised(linear):
        raise RefusedError(
            f"{path} is quantised: adding {method}'s update would quantise its weight anew, an error as large "
            f"as the first; {DEQUANTIZE_FIRST}"
        )


def check_rows_scale(path: str, linear: Any) -> None:
    """Raises:
    RefusedError: the linear is quantised in blocks that lie across rows, or bitsandbytes has repacked it.
    """
    check_not_packed(path, linear)
    if is_4bit(linear) and linear.in_features % linear.weight.quant_state.blocksize:
        raise RefusedError(
            f"{path} has {linear.in_features} input features, no multiple of its 4-bit blocks of "
            f"{linear.weight.quant_state.blocksize}: one block would lie in two rows; {DEQUANTIZE_FIRST}"
        )


@contextmanager
def rounded_once(linear: nn.Module) -> Iterator[None]:
    """Inside, weight and bias of a dense linear are fp32, so that several updates are rounded together, at the end."""
    floating = [each for each in linear.parameters(recurse=False) if each.is_floating_point()]
    stored = [] if is_quantised(linear) else [(each, each.data) for each in floating]
    for parameter, tensor in stored:
        parameter.data = tensor.float()
    try:
        yield
    finally:
        for parameter, tensor in stored:
            parameter.data = tensor.copy_(parameter.data)


@torch.no_grad()
def add_lora(linear: nn.Module, lora_A: Tensor, lora_B: Tensor, scaling: float) -> None:
    """``W + c B A`` into the weight of an nn.Linear or a Conv1D of transformers.

    Args:
        lora_A: (r, I)
        lora_B: (O, r)
        scaling: c
    """
    add_weight(linear, scaling * (lora_B.float() @ lora_A.float()))


@torch.no_grad()
def add_weight(linear: nn.Module, change: Tensor) -> None:
    """``W + D`` into a dense linear's weight; ``change`` is D, (O, I)."""
    weight = dense_weight(linear)
    weight.copy_(weight.float() + change)


@torch.no_grad()
def add_bias(linear: Any, change: Tensor) -> None:
    """Adds ``change`` (O,) to a linear's bias."""
    linear.bias.copy_(linear.bias.float() + change)


@torch.no_grad()
def scale_columns(linear: nn.Module, scale: Tensor) -> None:
    """``W diag(u)`` into a dense linear's weight; ``scale`` is u, (I,)."""
    weight = dense_weight(linear)
    weight.copy_(weight.float() * scale)


@torch.no_grad()
def scale_rows_of_weight(linear: nn.Module, scale: Tensor) -> None:
    """``diag(v) W`` into a dense linear's weight alone; ``scale`` is v, (O,)."""
    weight = dense_weight(linear)
    weight.copy_(weight.float() * scale[:, None])


@torch.no_grad()
def scale_rows(linear: Any, scale: Tensor) -> None:
    """``diag(v) W`` and ``diag(v) b`` into a linear, dense or quantised; ``scale`` is v, (O,)."""
    if is_4bit(linear):
        _scale_blocks(linear.weight.quant_state, scale)
    elif is_quantised(linear):
        _scale_codes(linear, scale)
    else:
        scale_rows_of_weight(linear, scale)
    if linear.bias is not None:
        linear.bias.copy_(linear.bias.float() * scale)


def _scale_blocks(state: Any, scale: Tensor) -> None:
    """Scales the blocks of a 4-bit weight by the ``scale`` (O,) of their rows.

    A negative scale makes a negative absmax. NF4's codes have no mirror images, so they cannot change sign;
    but every kernel computes ``code * absmax``, which is exact for either. The scales of double quantisation
    are 8-bit codes themselves and become plain fp32 (0.37 bit a parameter more). Files take that layer by
    layer: bitsandbytes goes by the tensors it finds, not by the config's double_quant. Its packing for
    AVX512-BF16 is not undone for plain scales (0.50.2), so save before a forward that may pack.
    """
    absmax = block_scales(state)
    state.nested, state.state2, state.offset = False, None, None
    state.absmax = (absmax.view(len(scale), -1) * scale[:, None]).flatten()


def _scale_codes(linear: Any, scale: Tensor) -> None:
    row_scales(linear).mul_(scale.abs())
    linear.weight.data.mul_(torch.where(scale < 0, -1, 1).to(torch.int8)[:, None])

"""The maths of LoRA and IA3, as pure functions on stacked tensors: one slot per finetune, gathered per row.

One adapted linear computes, for row ``b`` whose finetune sits in slot ``s = slots[b]``::

    y_b = W(x_b * (1 + u_s)) * (1 + v_s) + c_s B_s A_s x_b

LoRA sets ``A, B`` and ``c = alpha / rank``; IA3 sets ``u`` (on inputs) or ``v`` (on outputs).

Dimension letters, used in every file of this package:

====== =======================================================
S      slots: finetunes held in one stack
B      rows of the batch; each belongs to one slot, or to none
T      tokens of a row
I, O   input and output features of the adapted linear
R      rank of the stack (the largest of its slots)
====== =======================================================

``slots`` is (B,) int64; ``BASE`` (-1) marks a row that the base model serves unchanged.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BASE = -1
"""The slot of a row without adapter."""
ALL_SERVED = "all_served"
"""Attribute of ``slots``: whether it was routed without any base row, so that nothing has to be replaced by zeros. What
is computed from such a tensor does not have it."""


def gather_slots(stack: Tensor, slots: Tensor) -> Tensor:
    """Each row's own entry of a stack; zeros for base rows.

    Selection, never multiplication: a slot full of NaN must not reach a base row, neither forward nor
    backward (``0 * NaN`` is NaN), so the gathered *weights* are replaced, not the product.

    Args:
        stack: (S, ...)
        slots: (B,)

    Returns:
        (B, ...)
    """
    if not torch.compiler.is_compiling() and getattr(slots, ALL_SERVED, False):
        return stack.index_select(0, slots)
    rows = stack.index_select(0, slots.clamp(min=0))
    used = (slots != BASE).view(-1, *[1] * (stack.dim() - 1))
    return torch.where(used, rows, torch.zeros((), dtype=stack.dtype, device=stack.device))


def embedding_columns(stack: Tensor, ids: Tensor, slots: Tensor) -> Tensor:
    """``W_s`` times the one-hot vector of every token: what a linear makes of an embedding's input.

    Args:
        stack: (S, O, V)
        ids: (B, T) int64
        slots: (B,)

    Returns:
        (B, T, O), exactly zero in base rows.
    """
    columns = stack.transpose(1, 2)[slots.clamp(min=0)[:, None], ids]
    used = (slots != BASE).view(-1, 1, 1)
    return torch.where(used, columns, torch.zeros((), dtype=stack.dtype, device=stack.device))


def lora_delta(x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: Tensor, slots: Tensor) -> Tensor:
    """``c_s B_s A_s x_b`` for every row, by two batched products: the cost grows with rows, not with slots.

    The weights are cast to ``x``'s dtype instead of ``x`` to theirs: activations outweigh adapters. The
    scaling is folded into ``B`` before that cast, so a scaling that bf16 cannot hold costs no precision.

    Args:
        x: (B, T, I), or (B, T) int64 on an embedding
        lora_A: (S, R, I)
        lora_B: (S, O, R)
        scaling: (S,)
        slots: (B,)

    Returns:
        (B, T, O), exactly zero in base rows.
    """
    if not x.is_floating_point():
        B = gather_slots(lora_B, slots) * gather_slots(scaling, slots)[:, None, None]
        return torch.bmm(embedding_columns(lora_A, x, slots), B.transpose(1, 2))
    return low_rank(x, *lora_of_rows(lora_A, lora_B, scaling, slots, x.dtype))


def lora_of_rows(
    lora_A: Tensor, lora_B: Tensor, scaling: Tensor, slots: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Each row's own ``A`` (B, R, I) and ``c B`` (B, O, R), of the shapes of `lora_delta`."""
    A = gather_slots(lora_A, slots).to(dtype)
    B = (gather_slots(lora_B, slots) * gather_slots(scaling, slots)[:, None, None]).to(dtype)
    return A, B


def low_rank(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """``B_b A_b x_b`` for (B, T, I), (B, R, I) and (B, O, R) -> (B, T, O)."""
    return torch.bmm(torch.bmm(x, A.transpose(1, 2)), B.transpose(1, 2))


def add_lora_of_one(y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: Tensor) -> Tensor:
    """``y + c B A x`` where the only slot serves every row: two plain products, the second into ``y`` itself.

    Args:
        y: (B, T, O), what the frozen linear has just returned; its memory holds the result, so that nobody else
            may keep it.
        x: (B, T, I)
        lora_A: (1, R, I)
        lora_B: (1, O, R)
        scaling: (1,)

    Returns:
        (B, T, O)
    """
    if torch.compiler.is_compiling():  # it fuses by itself, and cannot trace what writes in place
        A, B = lora_A[0].to(x.dtype), (lora_B[0] * scaling).to(x.dtype)
        return torch.addmm(y.flatten(0, 1), x.flatten(0, 1) @ A.T, B.T).view_as(y)
    if y._is_view() or not y.is_contiguous():  # autograd has no cheap way to write into a view
        y = y.clone(memory_format=torch.contiguous_format)
    return _AddLora.apply(y, x, lora_A, lora_B, scaling)


class _AddLora(torch.autograd.Function):
    """`add_lora_of_one` with its six products and little more: autograd's own record of it selects, casts, scales and
    copies for about as long as it multiplies matrices this thin."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: Tensor) -> Tensor:
        A, B = lora_A[0].to(x.dtype), (lora_B[0] * scaling).to(x.dtype)
        hidden = x.flatten(0, 1) @ A.T
        ctx.save_for_backward(x, hidden, A, B, scaling)
        ctx.dtypes = lora_A.dtype, lora_B.dtype
        ctx.mark_dirty(y)
        y.view(-1, y.shape[-1]).addmm_(hidden, B.T)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, A, B, scaling = ctx.saved_tensors
        rows = grad.flatten(0, 1)
        grad_hidden = rows @ B
        grad_x = (grad_hidden @ A).view_as(x) if ctx.needs_input_grad[1] else None
        grad_A = grad_B = None
        if ctx.needs_input_grad[2]:
            grad_A = (grad_hidden.T @ x.flatten(0, 1)).to(ctx.dtypes[0])[None]
        if ctx.needs_input_grad[3]:
            grad_B = ((rows.T @ hidden).to(ctx.dtypes[1]) * scaling)[None]
        return grad, grad_x, grad_A, grad_B, None


def ia3_scale(x: Tensor, delta: Tensor) -> Tensor:
    """``x * (1 + delta)``, written so that a small delta survives bf16 (``1 + delta`` would round it away).

    Args:
        x: (B, T, features)
        delta: broadcastable to ``x``: (B, 1, features) or (features,)

    Returns:
        (B, T, features); bitwise ``x`` where delta is zero.
    """
    return torch.addcmul(x, x, delta.to(x.dtype))

"""The maths of the adapters, as pure functions on stacked tensors.

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

import torch
from torch import Tensor
from torch.nn import functional as F

BASE = -1
"""The slot of a row without adapter."""


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
    rows = stack.index_select(0, slots.clamp(min=0))
    used = (slots != BASE).view(-1, *[1] * (stack.dim() - 1))
    return torch.where(used, rows, torch.zeros((), dtype=stack.dtype, device=stack.device))


def lora_delta(x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: Tensor, slots: Tensor) -> Tensor:
    """``c_s B_s A_s x_b`` for every row, by two batched products: the cost grows with rows, not with slots.

    The weights are cast to ``x``'s dtype instead of ``x`` to theirs: activations outweigh adapters. The
    scaling is folded into ``B`` before that cast, so a scaling that bf16 cannot hold costs no precision.

    Args:
        x: (B, T, I)
        lora_A: (S, R, I)
        lora_B: (S, O, R)
        scaling: (S,)
        slots: (B,)

    Returns:
        (B, T, O), exactly zero in base rows.
    """
    A = gather_slots(lora_A, slots).to(x.dtype)
    B = (gather_slots(lora_B, slots) * gather_slots(scaling, slots)[:, None, None]).to(x.dtype)
    return torch.bmm(torch.bmm(x, A.transpose(1, 2)), B.transpose(1, 2))


def add_lora_of_one(y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: Tensor) -> Tensor:
    """``y + c B A x`` where one slot serves every row: two plain products, the second onto ``y``.

    Args:
        y: (B, T, O)
        x: (B, T, I)
        lora_A: (R, I)
        lora_B: (O, R)
        scaling: ()

    Returns:
        (B, T, O)
    """
    hidden = F.linear(x, lora_A.to(x.dtype)).flatten(0, 1)
    B = (lora_B * scaling).to(x.dtype)
    return torch.addmm(y.flatten(0, 1), hidden, B.T).view_as(y)


def ia3_scale(x: Tensor, delta: Tensor) -> Tensor:
    """``x * (1 + delta)``, written so that a small delta survives bf16 (``1 + delta`` would round it away).

    Args:
        x: (B, T, features)
        delta: broadcastable to ``x``: (B, 1, features) or (features,)

    Returns:
        (B, T, features); bitwise ``x`` where delta is zero.
    """
    return torch.addcmul(x, x, delta.to(x.dtype))

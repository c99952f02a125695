"""Grouped-query attention for decoding: the heads that share keys and values read them in place.

The eager attention of transformers copies keys and values once per head first, at every step and layer; with few
queries that takes longer than the attention itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

GROUPED = "mmpeft_grouped"
"""Its name among the attention functions of transformers."""


def grouped_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """softmax(scaling * Q K^T + mask) V, in evaluation.

    Args:
        module: the attention layer.
        query: (rows, heads, queries, dim)
        key: (rows, key heads, keys, dim)
        value: (rows, key heads, keys, value dim)
        attention_mask: (rows, 1, queries, keys), added to the scores.
        scaling: of the scores; None is dim ** -0.5.

    Returns:
        (rows, queries, heads, value dim), and no weights.
    """
    rows, heads, queries, dim = query.shape
    grouped = query.reshape(rows, key.shape[1], -1, dim).flatten(0, 1)
    keys, scale = key.flatten(0, 1).transpose(1, 2), dim**-0.5 if scaling is None else scaling
    if queries == 1:  # the usual step: one operator for product, scaling and mask
        mask = attention_mask.expand(-1, key.shape[1], -1, -1).flatten(0, 1)
        scores = torch.baddbmm(mask, grouped, keys, alpha=scale)
    else:
        product = torch.bmm(grouped, keys).view(*key.shape[:2], -1, queries, keys.shape[-1])
        scores = torch.add(attention_mask[:, :, None], product, alpha=scale).flatten(2, 3).flatten(0, 1)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
    output = torch.bmm(weights, value.flatten(0, 1))
    return output.reshape(rows, heads, queries, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(GROUPED, grouped_attention)


@contextmanager
def attention_for_decoding(decoder: Any) -> Iterator[None]:
    """Inside, eager attention is grouped, where the model's own is the plain one that SDPA could replace."""
    config = decoder.config
    chosen = config._attn_implementation
    plain = decoder._supports_sdpa and decoder._supports_attention_backend
    if chosen != "eager" or not plain or getattr(config, "attn_logit_softcapping", None):
        yield
        return
    config._attn_implementation = GROUPED
    try:
        yield
    finally:
        config._attn_implementation = chosen

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
    grouped = query.reshape(rows, key.shape[1], -1, dim)
    # keys first: on CPU the product with few queries on the right is the faster one
    scores = torch.matmul(key, grouped.transpose(2, 3)).transpose(2, 3)
    scaled = torch.add(
        attention_mask[:, :, None],
        scores.unflatten(2, (-1, queries)),
        alpha=dim**-0.5 if scaling is None else scaling,
    )
    weights = torch.softmax(scaled, -1, dtype=torch.float32).to(query.dtype)
    output = torch.matmul(weights.flatten(2, 3), value)
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

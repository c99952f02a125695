"""Prefix tuning's KV cache: trained keys and values that a forward reads, and to which it adds nothing."""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache


class PrefixCache(DynamicCache):
    """Of a forward that keeps nothing for another: a layer that recomputes its activations in the backward finds what
    it found in the forward.

    Args:
        prefix: (layers, 2, rows, heads, prefix columns, head dim)
    """

    def __init__(self, prefix: Tensor):
        super().__init__()
        for layer, (keys, values) in enumerate(prefix):
            super().update(keys, values, layer)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """(rows, heads, columns, head dim) of a layer -> the same behind the prefix."""
        kept: Any = self.layers[layer_idx]
        return torch.cat([kept.keys, key_states], -2), torch.cat([kept.values, value_states], -2)

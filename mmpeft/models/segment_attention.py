"""Attention by segments: softmax(Q K^T) V of packed rows without the products that their mask throws away."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface

from mmpeft.models.segments import BLOCK, Tile

BY_SEGMENTS = "mmpeft_segments"
"""Its name among the attention functions of transformers."""
KNOWN = {"dropout", "sliding_window", "is_causal", "position_ids", "use_cache", "output_attentions"}
"""What models tell their attention beside its scaling, and what changes nothing here: nothing is dropped, and windows
are in the mask. Anything else (caps, sinks, biases) changes the scores."""


def segment_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """softmax(scaling * Q K^T) V, every query with the keys that it sees.

    Args:
        module: the attention layer.
        query: (rows, heads, queries, dim)
        key: (rows, key heads, keys, dim)
        value: (rows, key heads, keys, value dim)
        attention_mask: a `SegmentMask`.
        scaling: of the scores; None is dim ** -0.5.
        others: what else a model tells its attention.

    Returns:
        (rows, queries, heads, value dim), and no weights.

    Raises:
        ValueError: the model's attention is more than that, or its mask was changed on the way.
    """
    if more := sorted(name for name, given in others.items() if given is not None and name not in KNOWN):
        raise ValueError(f"its attention reads {', '.join(more)}, which attention by segments does not know")
    if others.get("dropout"):
        raise ValueError("its attention drops weights, which attention by segments does not")
    work = getattr(attention_mask, "work", None)
    if work is None or attention_mask.shape[2:] != (query.shape[2], key.shape[2]):
        raise ValueError("it changes the mask that it is given before it attends")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(work, BlockMask):
        return _by_blocks(query, key, value, work, scale), None
    return _ByTiles.apply(query, key, value, work, scale), None  # pyright: ignore[reportReturnType]


AttentionInterface.register(BY_SEGMENTS, segment_attention)


@contextmanager
def attending(config: Any, name: str) -> Iterator[None]:
    """Inside, the layers of a decoder attend by another function of transformers.

    Args:
        config: the decoder's.
        name: of the function.
    """
    chosen, config._attn_implementation = config._attn_implementation, name
    try:
        yield
    finally:
        config._attn_implementation = chosen


class _ByTiles(torch.autograd.Function):
    """Tile by tile, by dense products; the weights of each are kept for the backward, in the queries' dtype."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, tiles: list[Tile], scaling: float
    ) -> Tensor:
        rows, heads, queries, _ = query.shape
        output = query.new_empty(rows, queries, heads, value.shape[-1])
        kept: list[Tensor] = []
        for tile in tiles:
            weights = _weights(_grouped(query[:, :, tile.queries], key) * scaling, tile.take(key), tile.mask)
            own = torch.matmul(weights, tile.take(value))
            output[:, tile.queries] = own.view(rows, heads, -1, own.shape[-1]).transpose(1, 2)
            if any(ctx.needs_input_grad):
                kept.append(weights)
        if kept:
            ctx.save_for_backward(query, key, value, *kept)
            ctx.tiles, ctx.scaling = tiles, scaling
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        query, key, value, *kept = ctx.saved_tensors
        gradient = gradients[0].transpose(1, 2)
        # of keys that several tiles see, the parts are summed before they are rounded
        of_query, of_key, of_value = (
            torch.zeros(states.shape, dtype=torch.promote_types(states.dtype, dtype), device=states.device)
            for states, dtype in ((query, query.dtype), (key, torch.float32), (value, torch.float32))
        )
        for tile, weights in zip(ctx.tiles, kept, strict=True):
            own = _grouped(gradient[:, :, tile.queries], key)
            tile.add_to(of_value, torch.matmul(weights.transpose(2, 3), own))
            of_weights = torch.matmul(own, tile.take(value).transpose(2, 3))
            of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            of_tile = torch.matmul(of_scores, tile.take(key)) * ctx.scaling
            of_query[:, :, tile.queries] = of_tile.view(*query.shape[:2], -1, query.shape[-1])
            asked = _grouped(query[:, :, tile.queries], key) * ctx.scaling
            tile.add_to(of_key, torch.matmul(of_scores.transpose(2, 3), asked))
        return of_query, of_key.to(key.dtype), of_value.to(value.dtype), None, None


def _grouped(states: Tensor, key: Tensor) -> Tensor:
    """(rows, heads, queries, dim) -> (rows, key heads, heads of each times queries, dim)."""
    return states.unflatten(1, (key.shape[1], -1)).flatten(2, 3)


def _weights(asked: Tensor, key: Tensor, mask: Tensor) -> Tensor:
    """(rows, key heads, heads of each times queries, keys)"""
    scores = torch.matmul(asked, key.transpose(2, 3))
    scores.unflatten(2, (-1, mask.shape[2])).add_(mask[:, :, None])
    return torch.softmax(scores, -1)  # which sums in fp32


@cache
def _flex(compiled: bool) -> Any:
    return torch.compile(flex_attention) if compiled else flex_attention


def _by_blocks(query: Tensor, key: Tensor, value: Tensor, blocks: BlockMask, scaling: float) -> Tensor:
    """By flex attention, compiled once on a GPU; columns are filled up to whole blocks."""
    heads, queries = query.shape[1:3]
    shared = heads & (heads - 1) == 0  # its kernels share keys among a power of two of heads
    if not shared:
        key, value = (states.repeat_interleave(heads // states.shape[1], 1) for states in (key, value))
    whole = [nn.functional.pad(each, (0, 0, 0, -each.shape[2] % BLOCK)) for each in (query, key, value)]
    attend = _flex(query.is_cuda)
    output = attend(*whole, block_mask=blocks, scale=scaling, enable_gqa=shared)
    return output[:, :, :queries].transpose(1, 2).contiguous()

"""Attention rollout: how much of every column reaches a position through the attention of all layers.

Source: Abnar and Zuidema 2020, "Quantifying Attention Flow in Transformers", section 3: the product over the layers of
``(W + I) / 2``, rows of which sum to 1, with ``W`` the mean of a layer's heads.

It tells where attention looks, not what for, and knows nothing of the feed-forward.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mmpeft.errors import RefusedError
from mmpeft.models.reader import LanguageReader
from mmpeft.models.segment_attention import attending

WANTED = "output_attentions"
"""What a decoder of transformers calls its attention weights when it is asked for them."""


@torch.no_grad()
def roll_out(attentions: Sequence[Tensor], positions: Tensor) -> Tensor:
    """Args:
        attentions: (heads, columns, keys) weights of every layer; keys before the columns, such as a trained prefix,
            are left out.
        positions: (n,) int64 of columns.

    Returns:
        (n, columns) float32, of which every row sums to 1.
    """
    columns = attentions[0].shape[1]
    flow = torch.eye(columns, device=attentions[0].device)[positions]
    for weights in reversed(attentions):
        mixed = weights[..., -columns:].float().mean(0)
        mixed.diagonal().add_(1)
        flow = flow @ (mixed / mixed.sum(-1, keepdim=True))
    return flow


@contextmanager
def attention_weights(reader: LanguageReader) -> Iterator[list[Tensor]]:
    """Inside, the decoder attends by its own eager attention, which has weights. The list gets those of every layer,
    (rows, heads, columns, keys), with each forward."""
    decoder, found = reader.decoder, list[Tensor]()

    def ask(module: Any, given: Any, named: dict[str, Any]) -> Any:
        return given, named | {WANTED: True}

    def keep(module: Any, given: Any, output: Any) -> None:
        found[:] = [weights for weights in getattr(output, "attentions", None) or () if weights is not None]

    by_segments, reader.by_segments = reader.by_segments, False
    hooks = [decoder.register_forward_hook(keep)]
    if _takes(decoder, WANTED):
        hooks.append(decoder.register_forward_pre_hook(ask, with_kwargs=True))
    try:
        with attending(reader.config, "eager"):
            yield found
    finally:
        reader.by_segments = by_segments
        for hook in hooks:
            hook.remove()


def check_weights(reader: LanguageReader, found: Sequence[Tensor]) -> None:
    """Args:
        reader: of the language model.
        found: what `attention_weights` got of it.

    Raises:
        RefusedError: not every layer has weights between its columns.
    """
    num_layers = reader.config.num_hidden_layers
    whole = [each for each in found if each.dim() == 4 and each.shape[2] <= each.shape[3]]
    if len(whole) != num_layers:
        raise RefusedError(
            f"{type(reader.language_model).__name__} has attention weights in {len(whole)} of its {num_layers} layers, "
            "and a rollout needs those of all: what state spaces and convolutions mix has none. Take gradient x input"
        )


def _takes(decoder: Any, name: str) -> bool:
    arguments = inspect.signature(decoder.forward).parameters.values()
    return any(each.name == name or each.kind is each.VAR_KEYWORD for each in arguments)

"""The output head in float32: a 16-bit head multiplies exactly, but rounds its logits to 8 or 11 bits."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHUNK_BYTES = 2**22
"""Of the head in float32 at the same time: so many stay in a processor's cache."""


@contextmanager
def float32_head(language_model: Any, wanted: bool = True) -> Iterator[None]:
    """Inside, the model's logits are float32. A head that is quantised, or that adapters change, stays as it is: its
    finetunes were trained with what it gives."""
    head = language_model.get_output_embeddings()
    if not wanted or not _is_plain(head):
        yield
        return
    head.forward = partial(_linear, head)
    try:
        yield
    finally:
        del head.forward


def _is_plain(head: Any) -> bool:
    halves = (torch.bfloat16, torch.float16)
    return type(head) is nn.Linear and head.weight.dtype in halves and "forward" not in head.__dict__


def _linear(head: nn.Linear, hidden: Tensor) -> Tensor:
    """(..., dim) -> (..., vocabulary) float32, without gradients"""
    weight, rows = head.weight, max(1, CHUNK_BYTES // (4 * head.in_features))
    hidden = hidden.float()
    # one chunk for all, as new pages cost more than the products
    chunk = hidden.new_empty(min(rows, len(weight)), head.in_features)
    logits = hidden.new_empty(*hidden.shape[:-1], len(weight))
    with torch.no_grad():
        for start in range(0, len(weight), rows):
            of_head = weight[start : start + rows]
            logits[..., start : start + rows] = F.linear(hidden, chunk[: len(of_head)].copy_(of_head))
    return logits if head.bias is None else logits + head.bias.float()

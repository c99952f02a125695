"""Virtual tokens: what rows with prompts or prefixes read before their own tokens.

They stand in columns to the left of the batch, each row's own; columns that a row does not use are padding, so rows
of every method, and base rows, share one batch::

    row with a prefix of 2      k k . | [INST] <Img> ...      k  trained keys and values, in the cache
    row with a prompt of 1      . . p | [INST] <Img> ...      p  a trained embedding
    base row                    . . . | [INST] <Img> ...      .  seen by nobody
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmpeft.adapters import AdapterBank
from mmpeft.adapters.methods.stack import Stack
from mmpeft.data.batch import PADDING
from mmpeft.data.packing import PREFIX
from mmpeft.transfer import to_device


@dataclass
class VirtualTokens:
    """The virtual columns of a batch: first those of prefixes, then those of prompts."""

    segments: Tensor
    """(rows, columns) int64: `PREFIX` where the row has a virtual token, else `PADDING`."""
    lengths: Tensor
    """(rows,) int64: how far the row's own positions move."""
    keys_values: Tensor | None
    """(layers, 2, rows, heads, prefix columns, head dim)"""
    embeds: Tensor
    """(rows, prompt columns, dim)"""
    positions: Tensor
    """(rows, columns) int64"""
    on_host: tuple[np.ndarray, np.ndarray]
    """The segments and the lengths once more."""

    @property
    def num_prompts(self) -> int:
        return self.embeds.shape[1]


def virtual_tokens(bank: AdapterBank, num_rows: int, device: torch.device) -> VirtualTokens | None:
    """The virtual tokens of the rows that the bank was last routed for; None where no row has any."""
    slots = bank.routing.slots
    lengths = np.zeros(num_rows, np.int64)
    segments: list[np.ndarray] = []
    positions: list[np.ndarray] = []

    def stand_next(stack: Stack) -> int:
        """Gives the rows their next columns; as many as the longest has."""
        nonlocal lengths
        own = np.array(
            [stack.sizes[row[stack.method]] if stack.method in row else 0 for row in bank.routing.owned]
        )
        columns = np.arange(own.max(initial=0))
        segments.append(np.where(columns < own[:, None], PREFIX, PADDING))
        positions.append(lengths[:, None] + columns)
        lengths = lengths + own
        return len(columns)

    keys_values: list[Tensor] = []
    embeds: list[Tensor] = []
    for method, stack in bank.inputs.items():  # all prefixes stand before all prompts
        inputs = bank.model_inputs()
        prefixes = stack.virtual_keys_values(slots[method], inputs.num_layers, inputs.num_key_heads)
        if prefixes is not None:
            keys_values.append(prefixes[..., : stand_next(stack), :])
    for method, stack in bank.inputs.items():
        if (prompts := stack.virtual_embeds(slots[method])) is not None:
            embeds.append(prompts[:, : stand_next(stack)])
    if not lengths.any():
        return None
    all_segments = np.concatenate(segments, 1)
    return VirtualTokens(
        segments=to_device(all_segments, device),
        lengths=to_device(lengths, device),
        keys_values=torch.cat(keys_values, -2) if keys_values else None,
        embeds=torch.cat(embeds, 1) if embeds else torch.zeros(num_rows, 0, 0, device=device),
        positions=to_device(np.concatenate(positions, 1), device),
        on_host=(all_segments, lengths),
    )

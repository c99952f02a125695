"""Virtual tokens: what rows with prompts or prefixes read before their own tokens.

They stand in columns to the left of the batch, each row's own; columns that a row does not use are padding, so rows
of every method, and base rows, share one batch::

    row with a prefix of 2      k k . | [INST] <Img> ...      k  trained keys and values, in the cache
    row with a prompt of 1      . . p | [INST] <Img> ...      p  a trained embedding
    base row                    . . . | [INST] <Img> ...      .  seen by nobody
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mmpeft.adapters import AdapterBank
from mmpeft.data.batch import PADDING
from mmpeft.data.packing import PREFIX


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

    @property
    def num_prompts(self) -> int:
        return self.embeds.shape[1]


def virtual_tokens(bank: AdapterBank, num_rows: int, device: torch.device) -> VirtualTokens | None:
    """The virtual tokens of the rows that the bank was last routed for; None where no row has any."""
    slots = bank.routing.slots
    lengths = torch.zeros(num_rows, dtype=torch.int64, device=device)
    segments: list[Tensor] = []
    positions: list[Tensor] = []
    keys_values: list[Tensor] = []
    embeds: list[Tensor] = []
    for method, stack in bank.inputs.items():  # all prefixes stand before all prompts
        inputs = bank.model_inputs()
        found = stack.virtual_keys_values(slots[method], inputs.num_layers, inputs.num_key_heads)
        if found is not None:
            prefixes, own = found
            columns = torch.arange(int(own.max()), device=device)
            keys_values.append(prefixes[..., : len(columns), :])
            segments.append(_segments(columns, own))
            positions.append(lengths[:, None] + columns)
            lengths = lengths + own
    for method, stack in bank.inputs.items():
        if (found := stack.virtual_embeds(slots[method])) is not None:
            prompts, own = found
            columns = torch.arange(int(own.max()), device=device)
            embeds.append(prompts[:, : len(columns)])
            segments.append(_segments(columns, own))
            positions.append(lengths[:, None] + columns)
            lengths = lengths + own
    if not segments or not bool(lengths.any()):
        return None
    return VirtualTokens(
        segments=torch.cat(segments, 1),
        lengths=lengths,
        keys_values=torch.cat(keys_values, -2) if keys_values else None,
        embeds=torch.cat(embeds, 1) if embeds else lengths.new_zeros(num_rows, 0, 0),
        positions=torch.cat(positions, 1),
    )


def _segments(columns: Tensor, lengths: Tensor) -> Tensor:
    """(rows, columns): which of its virtual columns each row uses."""
    return torch.where(columns < lengths[:, None], PREFIX, PADDING)

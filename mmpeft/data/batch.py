"""Packed rows -> `Batch`: the one place that knows padding."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate

import torch
from torch import Tensor, nn

from mmpeft.data.packing import PackedRow
from mmpeft.data.template import IGNORE_INDEX
from mmpeft.errors import RefusedError

PADDING = -1
"""The segment of a position that is no token of its row."""


@dataclass
class Batch:
    """Rows of tokens, right-padded. Rows are never reordered: row b belongs to ``adapters[b]``."""

    input_ids: Tensor
    """(rows, tokens) int64, `IMAGE_TOKEN` at image features."""
    targets: Tensor
    """(rows, tokens) int64: the next token where it carries loss, else `IGNORE_INDEX`."""
    positions: Tensor
    """(rows, tokens) int64, from 0 in every conversation."""
    segments: Tensor
    """(rows, tokens) int64: `PREFIX`, the conversation's segment, or `PADDING`."""
    features: Tensor | None
    """(images, image tokens, vision dim), in the order of the rows' image tokens; None without images."""
    image_rows: Tensor
    """(images,) int64: the row each image stands in."""
    adapters: list[str | None]
    """The adapter of every row; None is the base model."""
    right: list[int] = field(default_factory=list)
    """Per row of choices the segment of the right one, or `UNKNOWN`; `NO_CHOICES` for plain conversations."""
    examples: list[list[int]] = field(default_factory=list)
    """Per row the numbers of its examples in their data set, where the batch comes from one."""

    def to(self, device: torch.device | str) -> "Batch":
        tensors = {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        return replace(
            self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
        )


def collate(rows: Sequence[PackedRow], features: Tensor | None, adapters: Sequence[str | None]) -> Batch:
    """Pads rows to the longest. ``features`` holds the images of all rows, in order."""
    width = max(len(row.ids) for row in rows)

    def padded(name: str, value: int) -> Tensor:
        lists = [getattr(row, name) for row in rows]
        return torch.tensor([values + [value] * (width - len(values)) for values in lists], dtype=torch.int64)

    image_rows = [number for number, row in enumerate(rows) for _ in row.images]
    if len(image_rows) != (0 if features is None else len(features)):
        raise RefusedError(
            f"the rows have {len(image_rows)} images, but features of {0 if features is None else len(features)}"
        )
    return Batch(
        input_ids=padded("ids", 0),
        targets=padded("targets", IGNORE_INDEX),
        positions=padded("positions", 0),
        segments=padded("segments", PADDING),
        features=features,
        image_rows=torch.tensor(image_rows, dtype=torch.int64),
        adapters=list(adapters),
        right=[row.right for row in rows],
    )


def concatenate(batches: Sequence[Batch]) -> Batch:
    """The rows of several batches in one, padded to the widest."""
    if len(batches) == 1:
        return batches[0]
    width = max(batch.input_ids.shape[1] for batch in batches)

    def padded(name: str, value: int) -> Tensor:
        tensors = [getattr(batch, name) for batch in batches]
        return torch.cat([nn.functional.pad(t, (0, width - t.shape[1]), value=value) for t in tensors])

    features = [batch.features for batch in batches if batch.features is not None]
    firsts = accumulate((len(batch.input_ids) for batch in batches), initial=0)
    return Batch(
        input_ids=padded("input_ids", 0),
        targets=padded("targets", IGNORE_INDEX),
        positions=padded("positions", 0),
        segments=padded("segments", PADDING),
        features=torch.cat(features) if features else None,
        image_rows=torch.cat(
            [batch.image_rows + first for batch, first in zip(batches, firsts, strict=False)]
        ),
        adapters=[adapter for batch in batches for adapter in batch.adapters],
        right=[right for batch in batches for right in batch.right],
        examples=[examples for batch in batches for examples in batch.examples],
    )

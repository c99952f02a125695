"""Collate: packed rows -> one padded `Batch`, and which conversation stands where."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from mmpeft.data.packing import PREFIX, PackedRow, Role
from mmpeft.data.template import IGNORE_INDEX
from mmpeft.errors import RefusedError

PADDING = -1
"""The segment of a position that is no token of its row."""


class Tensors:
    """A dataclass of tensors and other things, of which the tensors live on one device."""

    def to(self, device: torch.device | str) -> Self:
        """The same with its tensors there."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}  # pyright: ignore[reportArgumentType]
        moved = {n: v.to(device, non_blocking=True) for n, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **moved)  # pyright: ignore[reportArgumentType]


@dataclass
class OnHost:
    """What stands in a batch, for the host to look at without waiting for the device; shapes as in `Batch`."""

    input_ids: np.ndarray
    targets: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    image_rows: np.ndarray


@dataclass
class Conversations:
    """What stands in a batch, row by row in the order of the segments; all (conversations,) int64, on the host."""

    rows: np.ndarray
    segments: np.ndarray
    roles: np.ndarray
    """A `Role`: answer, right or wrong choice."""
    examples: np.ndarray
    """Number of its example among those that the batch was made from; the choices of a question share theirs."""

    @property
    def num_examples(self) -> int:
        """How many questions or captions there are; one with choices counts once."""
        answers = self.roles == Role.ANSWER
        return int(answers.sum()) + len(np.unique(self.rows[~answers]))

    def where(self, mask: np.ndarray) -> "Conversations":
        """Those that ``mask`` (conversations,) bool picks."""
        return Conversations(*(getattr(self, each.name)[mask] for each in fields(self)))


@dataclass
class Batch(Tensors):
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
    conversations: Conversations
    """What stands in which segment of which row."""
    dropout_seeds: dict[str, int] = field(default_factory=dict)
    """Adapter -> the seed of what it drops in this batch; empty where that is left to torch's global generator."""
    _on_host: OnHost | None = field(default=None, init=False, repr=False, compare=False)

    def to(self, device: torch.device | str) -> Self:
        """The same with its tensors there; what was on the host can still be looked at (`on_host`)."""
        moved = super().to(device)
        moved._on_host = self.on_host
        return moved

    @property
    def on_host(self) -> OnHost:
        """Of a batch that no `to` brought to its device, this waits for the device."""
        if self._on_host is not None:
            return self._on_host
        return OnHost(*(getattr(self, each.name).cpu().numpy() for each in fields(OnHost)))


def collate(
    rows: Sequence[PackedRow],
    features: Tensor | None,
    adapters: Sequence[str | None],
    examples: Sequence[Sequence[int]] | None = None,
) -> Batch:
    """Pads rows to the longest.

    Args:
        rows: at least one.
        features: of the images of all rows, in order.
        adapters: of every row.
        examples: per row the numbers of its examples; a question's choices are one example. By default the rows'.
    """
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
        conversations=_conversations(
            rows, [[number] for number in range(len(rows))] if examples is None else examples
        ),
    )


def _conversations(rows: Sequence[PackedRow], examples: Sequence[Sequence[int]]) -> Conversations:
    table = [
        (number, segment, role, own[0] if len(own) == 1 else own[segment - PREFIX - 1])
        for number, (row, own) in enumerate(zip(rows, examples, strict=True))
        for segment, role in enumerate(row.roles, start=PREFIX + 1)
    ]
    return Conversations(*np.array(table, np.int64).reshape(-1, 4).T)


def concatenate(batches: Sequence[Batch]) -> Batch:
    """The rows of several batches in one, padded to the widest."""
    if len(batches) == 1:
        return batches[0]
    width = max(batch.input_ids.shape[1] for batch in batches)

    def padded(name: str, value: int) -> Tensor:
        tensors = [getattr(batch, name) for batch in batches]
        return torch.cat([nn.functional.pad(t, (0, width - t.shape[1]), value=value) for t in tensors])

    def numbered(rows: Sequence[Any]) -> list[Any]:
        return [own + first for own, first in zip(rows, firsts, strict=True)]

    features = [batch.features for batch in batches if batch.features is not None]
    firsts = [0, *accumulate(len(batch.input_ids) for batch in batches)][:-1]
    tables = [batch.conversations for batch in batches]
    columns = {each.name: [getattr(t, each.name) for t in tables] for each in fields(Conversations)}
    columns |= {"rows": numbered(columns["rows"])}
    return Batch(
        input_ids=padded("input_ids", 0),
        targets=padded("targets", IGNORE_INDEX),
        positions=padded("positions", 0),
        segments=padded("segments", PADDING),
        features=torch.cat(features) if features else None,
        image_rows=torch.cat(numbered([batch.image_rows for batch in batches])),
        adapters=[adapter for batch in batches for adapter in batch.adapters],
        conversations=Conversations(**{name: np.concatenate(own) for name, own in columns.items()}),
        dropout_seeds={name: seed for batch in batches for name, seed in batch.dropout_seeds.items()},
    )

"""Collate: packed rows -> one padded `Batch`, and which conversation stands where."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mmpeft.data.packing import PREFIX, PackedRow, Role
from mmpeft.data.template import IGNORE_INDEX
from mmpeft.errors import RefusedError

PADDING = -1
"""The segment of a position that is no token of its row."""


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


class StepCounts(NamedTuple):
    """What the losses of a step are means over."""

    answers: int
    """Tokens of answers and of right choices."""
    wrong: int
    """Tokens of wrong choices."""
    questions: int
    """Questions that have choices."""
    choices: int
    """Choices of these."""


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
    """(images, image tokens, vision dim), in the order of the rows' image tokens; None without images. Right-padded
    where images have different numbers of tokens."""
    image_rows: Tensor
    """(images,) int64: the row each image stands in."""
    adapters: list[str | None]
    """The adapter of every row; None is the base model."""
    conversations: Conversations
    """What stands in which segment of which row."""
    dropout_seeds: dict[str, int] = field(default_factory=dict)
    """Adapter -> the seed of what it drops in this batch; empty where that is left to torch's global generator."""
    image_tokens: np.ndarray | None = None
    """(images,) int64, on the host: the tokens of each; None where all have as many as the features are wide."""
    row_numbers: np.ndarray | None = None
    """(rows,) int64, on the host: the number of each among the rows of its adapter in the whole batch, of which other
    processes may have others; None where these are all."""
    of_step: dict[str | None, StepCounts] = field(default_factory=dict)
    """Adapter -> what its rows of the whole step count, those of other processes and batches among them; empty where
    these are all."""
    mismatched: "Batch | None" = None
    """The same questions, row by row, with answers to others of the whole batch; None where nobody asks for them."""
    _on_host: OnHost | None = field(default=None, init=False, repr=False, compare=False)

    def to(self, device: torch.device | str) -> "Batch":
        """The same with its tensors there; what was on the host can still be looked at (`on_host`)."""
        moved = self._each(lambda tensor: tensor.to(device, non_blocking=True))
        moved._on_host = self.on_host
        moved.mismatched = self.mismatched and self.mismatched.to(device)
        return moved

    def pinned(self) -> "Batch":
        """The same in memory from which a GPU copies while the processor goes on; itself where there is no GPU."""
        if not torch.cuda.is_available():
            return self
        pinned = self._each(Tensor.pin_memory)
        pinned.mismatched = self.mismatched and self.mismatched.pinned()
        return pinned

    def routed(self, adapters: Sequence[str | None]) -> "Batch":
        """The same rows of other adapters, which drop what torch's global generator says."""
        routed = replace(self, adapters=list(adapters), dropout_seeds={}, mismatched=None)
        routed._on_host = self.on_host
        return routed

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return replace(self, **{n: change(v) for n, v in values.items() if isinstance(v, Tensor)})

    def part(self, start: int, stop: int) -> "Batch":
        """Some of its rows, as wide as before, where they are."""
        host, table = self.on_host, self.conversations
        first, last = (int(place) for place in np.searchsorted(host.image_rows, [start, stop]))
        rows, images = slice(start, stop), slice(first, last)
        of_rows, of_images = OnHost(*(getattr(host, each.name)[rows] for each in fields(OnHost))), None
        of_rows.image_rows = host.image_rows[images] - start
        if self.image_tokens is not None:
            of_images = self.image_tokens[images]
        own = table.where((table.rows >= start) & (table.rows < stop))
        part = replace(
            self,
            **{name: getattr(self, name)[rows] for name in ("input_ids", "targets", "positions", "segments")},
            features=self.features[images] if self.features is not None and last > first else None,
            image_rows=self.image_rows[images] - start,
            image_tokens=of_images,
            adapters=self.adapters[rows],
            conversations=replace(own, rows=own.rows - start),
            row_numbers=None if self.row_numbers is None else self.row_numbers[rows],
            mismatched=None,
        )
        part._on_host = of_rows
        return part

    @property
    def on_host(self) -> OnHost:
        """Of a batch that no `to` brought to its device, this waits for the device."""
        if self._on_host is not None:
            return self._on_host
        return OnHost(*(getattr(self, each.name).cpu().numpy() for each in fields(OnHost)))

    @property
    def features_of_images(self) -> list[Tensor]:
        """(tokens, vision dim) of each image."""
        if self.features is None:
            return []
        if self.image_tokens is None:
            return list(self.features)
        return [own[:num] for own, num in zip(self.features, self.image_tokens, strict=True)]


def collate(
    rows: Sequence[PackedRow],
    features: Tensor | Sequence[Tensor] | None,
    adapters: Sequence[str | None],
    examples: Sequence[Sequence[int]] | None = None,
) -> Batch:
    """Pads rows to the longest.

    Args:
        rows: of which a process may have none.
        features: of the images of all rows, in order: (images, image tokens, vision dim), or (image tokens, vision dim)
            of each.
        adapters: of every row.
        examples: per row the numbers of its examples; a question's choices are one example. By default the rows'.
    """
    width = max((len(row.ids) for row in rows), default=0)

    def padded(name: str, value: int) -> Tensor:
        lists = [getattr(row, name) for row in rows]
        padded = [values + [value] * (width - len(values)) for values in lists]
        return torch.tensor(padded, dtype=torch.int64).reshape(len(rows), width)

    image_rows = [number for number, row in enumerate(rows) for _ in row.images]
    if len(image_rows) != (0 if features is None else len(features)):
        raise RefusedError(
            f"the rows have {len(image_rows)} images, but features of {0 if features is None else len(features)}"
        )
    _check_image_tokens(rows, features)
    together, image_tokens = _together([] if features is None else features)
    return Batch(
        input_ids=padded("ids", 0),
        targets=padded("targets", IGNORE_INDEX),
        positions=padded("positions", 0),
        segments=padded("segments", PADDING),
        features=together,
        image_rows=torch.tensor(image_rows, dtype=torch.int64),
        adapters=list(adapters),
        conversations=_conversations(
            rows, [[number] for number in range(len(rows))] if examples is None else examples
        ),
        image_tokens=image_tokens,
    )


def _check_image_tokens(rows: Sequence[PackedRow], features: Tensor | Sequence[Tensor] | None) -> None:
    """Where images have tokens by their shape, each must have as many as its row has places for it."""
    wanted = [number for row in rows for number in row.image_tokens or []]
    found = [len(own) for own in (features if wanted and features is not None else [])]
    if wanted != found:
        images = [image for row in rows for image in row.images]
        image, *numbers = next(own for own in zip(images, wanted, found, strict=True) if own[1] != own[2])
        raise RefusedError(
            f"image {image!r:.200} has {numbers[0]} places in its row, but features of {numbers[1]} tokens: it changed "
            "while it was read; start again when it is whole"
        )


def _together(features: Tensor | Sequence[Tensor]) -> tuple[Tensor | None, np.ndarray | None]:
    """`Batch.features` and `Batch.image_tokens`."""
    if isinstance(features, Tensor) or not features:
        return (features if isinstance(features, Tensor) else None), None
    numbers = [len(own) for own in features]
    if len(set(numbers)) == 1:
        return torch.stack(list(features)), None
    padded = nn.utils.rnn.pad_sequence(list(features), batch_first=True)
    return padded, np.array(numbers)


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
    mismatched = [batch.mismatched for batch in batches if batch.mismatched is not None]
    width = max(batch.input_ids.shape[1] for batch in batches)

    def padded(name: str, value: int) -> Tensor:
        tensors = [getattr(batch, name) for batch in batches]
        return torch.cat([nn.functional.pad(t, (0, width - t.shape[1]), value=value) for t in tensors])

    def numbered(rows: Sequence[Any]) -> list[Any]:
        return [own + first for own, first in zip(rows, firsts, strict=True)]

    firsts = [0, *accumulate(len(batch.input_ids) for batch in batches)][:-1]
    tables = [batch.conversations for batch in batches]
    features, image_tokens = _joined_features(batches)
    columns = {each.name: [getattr(t, each.name) for t in tables] for each in fields(Conversations)}
    columns |= {"rows": numbered(columns["rows"])}
    own_numbers = [batch.row_numbers for batch in batches if batch.row_numbers is not None]
    return Batch(
        input_ids=padded("input_ids", 0),
        targets=padded("targets", IGNORE_INDEX),
        positions=padded("positions", 0),
        segments=padded("segments", PADDING),
        features=features,
        image_tokens=image_tokens,
        image_rows=torch.cat(numbered([batch.image_rows for batch in batches])),
        adapters=[adapter for batch in batches for adapter in batch.adapters],
        conversations=Conversations(**{name: np.concatenate(own) for name, own in columns.items()}),
        dropout_seeds={name: seed for batch in batches for name, seed in batch.dropout_seeds.items()},
        row_numbers=np.concatenate(own_numbers) if len(own_numbers) == len(batches) else None,
        of_step={name: counts for batch in batches for name, counts in batch.of_step.items()},
        mismatched=concatenate(mismatched) if mismatched else None,
    )


def _joined_features(batches: Sequence[Batch]) -> tuple[Tensor | None, np.ndarray | None]:
    own = [batch for batch in batches if batch.features is not None]
    tensors = [batch.features for batch in own if batch.features is not None]
    alike = len({tensor.shape[1] for tensor in tensors}) <= 1 and all(b.image_tokens is None for b in own)
    if alike:
        return (torch.cat(tensors) if tensors else None), None
    return _together([features for batch in own for features in batch.features_of_images])

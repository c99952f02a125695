"""Records -> batches of packed rows, in an order that can be resumed in the middle of an epoch."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mmpeft.data.collate import Batch, collate
from mmpeft.data.packing import pack, plan_rows
from mmpeft.data.template import Encoded

BATCHES_SORTED_TOGETHER = 16
"""Rows of similar length share a batch within windows of this many batches, to pad less."""


@dataclass
class PackingConfig:
    """How conversations fill rows and batches."""

    batch_size: int = 4
    """Packed rows per batch; with images, a row holds the questions about one image."""
    max_conversations: int = 16
    """Most conversations in one row; 1 switches packing off."""
    max_length: int = 1024
    """Most tokens in one row, image tokens included."""


class PackedLoader:
    """Batches of packed rows.

    Lightning stores ``state_dict`` in its checkpoints, so a resumed run goes on with the next batch of the same
    order instead of replaying the epoch.

    Args:
        encoded: one conversation per example.
        features: images -> (images, image tokens, vision dim).
        adapter: the adapter that these examples belong to; None is the base.
        seed: with the epoch's number decides the order; None keeps the order of the examples.
    """

    def __init__(
        self,
        encoded: Sequence[Encoded],
        features: Callable[[Sequence[Any]], Tensor],
        packing: PackingConfig,
        adapter: str | None,
        seed: int | None,
    ):
        self.encoded = encoded
        self.features = features
        self.packing = packing
        self.adapter = adapter
        self.seed = seed
        self.epoch = 0
        self.position = 0
        self._plan = self._plan_epoch()

    def __len__(self) -> int:
        return len(self._plan)

    def __iter__(self) -> Iterator[Batch]:
        if self.position >= len(self._plan):
            self.epoch, self.position = self.epoch + 1, 0
        self._plan = self._plan_epoch()
        while self.position < len(self._plan):
            rows = self._plan[self.position]
            self.position += 1  # before the yield: a checkpoint taken after this batch goes on with the next
            yield self._batch(rows)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]

    def _batch(self, rows: list[list[int]]) -> Batch:
        packed = [pack([self.encoded[index] for index in row]) for row in rows]
        images = [image for row in packed for image in row.images]
        batch = collate(packed, self.features(images) if images else None, [self.adapter] * len(rows))
        batch.examples = rows
        return batch

    def _plan_epoch(self) -> list[list[list[int]]]:
        """Batches of rows of example numbers. Every epoch has the same number of batches."""
        packing = self.packing
        keys = [(tuple(example.images), example.task) for example in self.encoded]  # a task's prompts start alike
        lengths = [len(example.ids) for example in self.encoded]
        rng = random.Random(f"{self.seed} {self.epoch}")
        order = rng.sample(range(len(keys)), len(keys)) if self.seed is not None else list(range(len(keys)))
        rows = plan_rows(keys, lengths, order, packing.max_length, packing.max_conversations)
        if self.seed is not None:
            rng.shuffle(rows)
        window = packing.batch_size * BATCHES_SORTED_TOGETHER
        tokens = [sum(lengths[index] for index in row) for row in rows]
        numbers = [
            number
            for start in range(0, len(rows), window)
            for number in sorted(range(start, min(start + window, len(rows))), key=tokens.__getitem__)
        ]
        batches = [
            [rows[number] for number in numbers[start : start + packing.batch_size]]
            for start in range(0, len(numbers), packing.batch_size)
        ]
        if self.seed is not None:
            rng.shuffle(batches)
        return batches

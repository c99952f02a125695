"""The data loader: examples -> shuffled batches of packed rows, resumed exactly in the middle of an epoch."""

import random
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mmpeft.data.batch import Batch, collate, concatenate
from mmpeft.data.packing import PackedRow, pack, pack_choices, plan_rows
from mmpeft.data.sampling import mixed_order
from mmpeft.data.template import ChoiceSet, Example
from mmpeft.errors import require_positive
from mmpeft.hashing import seed_of

BATCHES_SORTED_TOGETHER = 32
"""Rows of similar length share a batch within windows of about this many batches, to pad less."""
Features = Callable[[Sequence[Any]], Tensor]
"""Images -> (images, image tokens, vision dim)."""


@dataclass
class PackingConfig:
    """How conversations fill rows and batches."""

    batch_size: int = 32
    """Conversations per batch, on average: rows are not torn apart."""
    max_conversations: int = 16
    """Most conversations in one row; 1 switches packing off."""
    max_length: int = 1024
    """Most tokens in one row, image features included."""

    def __post_init__(self):
        for name in ("batch_size", "max_conversations", "max_length"):
            require_positive(f"packing.{name}", getattr(self, name))


def plan_batches(
    keys: Sequence[Hashable],
    examples: Sequence[Example],
    packing: PackingConfig,
    order: Sequence[int] | None = None,
    shuffle: Callable[[list], None] = lambda rows: None,
) -> list[list[list[int]]]:
    """Which examples share a row and which rows a batch: packed by key, rows of similar length together.

    Args:
        keys: examples of one key may share a row, see `packing_key`.
        examples: at least one.
        packing: the sizes.
        order: in which the examples fill rows; all as they come by default.
        shuffle: of rows and then of batches, in place.

    Returns:
        Batches of rows of example numbers; as many batches whatever the order.
    """
    lengths = [sum(len(conversation.ids) for conversation in example.conversations) for example in examples]
    most = min(packing.max_conversations, packing.batch_size)
    wanted = range(len(examples)) if order is None else order
    rows = plan_rows(keys, lengths, wanted, packing.max_length, most)
    shuffle(rows)
    rows = _similar_together(rows, lengths, window=BATCHES_SORTED_TOGETHER * packing.batch_size)
    batches = split_evenly(rows, max(1, round(len(keys) / packing.batch_size)))
    shuffle(batches)
    return batches


def packing_key(number: int, example: Example) -> Hashable:
    """Examples of one key may share a row. By task as well: prompts of one task share its identifier."""
    return number if isinstance(example, ChoiceSet) else (tuple(example.images), example.task)


def pack_row(examples: Sequence[Example]) -> PackedRow:
    """Conversations that share a row, or one question with its choices."""
    first = examples[0]
    if isinstance(first, ChoiceSet):
        return pack_choices(first)
    return pack([conversation for example in examples for conversation in example.conversations])


def make_batch(
    examples: Sequence[Example] | Mapping[int, Example],
    rows: Sequence[Sequence[int]],
    features: Features,
    adapters: Sequence[str | None],
) -> Batch:
    """One batch of a plan: rows of numbers of ``examples``, with the features of their images."""
    packed = [pack_row([examples[number] for number in row]) for row in rows]
    images = [image for row in packed for image in row.images]
    return collate(packed, features(images) if images else None, adapters, rows)


class PackedLoader:
    """Batches of packed rows.

    Lightning stores ``state_dict`` in its checkpoints, so a resumed run goes on with the next batch of the same
    order instead of replaying the epoch.

    Args:
        examples: conversations, or questions with their choices, which have a row of their own.
        features: of images.
        adapter: the adapter that these examples belong to; None is the base.
        seed: with the epoch's number decides the order, and with the batch's what dropout drops; None keeps the order
            of the examples.
        mix: (examples, weight) of every file that the examples come from, in order; None sees each example once.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        features: Features,
        packing: PackingConfig,
        adapter: str | None,
        seed: int | None,
        mix: Sequence[tuple[int, float]] | None = None,
    ):
        self.examples = examples
        self.mix = mix
        self.features = features
        self.packing = packing
        self.adapter = adapter
        self.seed = seed
        self.epoch = 0
        self.position = 0
        self._keys = [packing_key(number, example) for number, example in enumerate(examples)]
        self._resumed = False
        self._plan = self._plan_epoch()

    def __len__(self) -> int:
        return len(self._plan)

    def __iter__(self) -> Iterator[Batch]:
        broken_off = self.position > 0 and not self._resumed  # as by Lightning's sanity check
        if broken_off or self.position >= len(self._plan):
            self.epoch, self.position = self.epoch + 1, 0
        self._resumed = False
        self._plan = self._plan_epoch()
        while self.position < len(self._plan):
            self.position += 1  # before the yield: a checkpoint taken after this batch goes on with the next
            yield self.batch(self.position - 1)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]
        self._resumed = True

    def packed_rows(self, batch: int) -> list[PackedRow]:
        """The rows of one batch of this epoch, before padding."""
        return [pack_row([self.examples[number] for number in row]) for row in self._plan[batch]]

    def batch(self, number: int) -> Batch:
        """One batch of this epoch. Its dropout has a seed of its own, so that a run drops the same however it came
        here: with other finetunes beside it, or resumed."""
        rows = self._plan[number]
        batch = make_batch(self.examples, rows, self.features, [self.adapter] * len(rows))
        if self.seed is not None and self.adapter is not None:
            batch.dropout_seeds = {self.adapter: seed_of("dropout", self.seed, self.epoch, number)}
        return batch

    def _plan_epoch(self) -> list[list[list[int]]]:
        """Batches of rows of example numbers; every epoch has the same number of batches."""
        if self.seed is None:
            return plan_batches(self._keys, self.examples, self.packing)
        rng = random.Random(f"{self.seed} {self.epoch}")
        return plan_batches(self._keys, self.examples, self.packing, self._order(rng), rng.shuffle)

    def _order(self, rng: random.Random) -> list[int]:
        if self.mix is None:
            return rng.sample(range(len(self.examples)), len(self.examples))
        sizes, weights = zip(*self.mix, strict=True)
        return mixed_order(sizes, weights, rng)


class JointLoader:
    """The batches of several finetunes side by side: every batch has the next rows of each.

    Args:
        loaders: finetune -> its own batches, in the order that it would see alone.
        max_steps: finetune -> batches after which it leaves; one that is not here goes on.
        cycle: whether a finetune begins its next epoch while others are still in theirs, as it would where
            training ends by steps; otherwise it waits for the others to finish.
    """

    def __init__(self, loaders: dict[str, PackedLoader], max_steps: dict[str, int], cycle: bool):
        self.loaders = loaders
        self.max_steps = max_steps
        self.cycle = cycle
        self.taken = dict.fromkeys(loaders, 0)
        self.position = 0
        self._resumed = False
        self._own: dict[str, Iterator[Batch]] = {}

    def __len__(self) -> int:
        return max(map(len, self.loaders.values()))

    def __iter__(self) -> Iterator[Batch]:
        within = self._resumed and self.position < len(self)
        self._resumed = False
        if not within:
            self.position = 0
        if not (self.cycle and self._own):  # those that cycle go on where the last of these epochs left them
            self._own = {name: self._batches(loader, within) for name, loader in self.loaders.items()}
        while self.position < len(self):
            self.position += 1
            names = [
                name for name in self.loaders if self.taken[name] < self.max_steps.get(name, sys.maxsize)
            ]
            batches = {name: batch for name in names if (batch := next(self._own[name], None))}
            if not batches:
                return
            for name in batches:
                self.taken[name] += 1
            yield concatenate(list(batches.values()))

    def everybody_left(self) -> bool:
        """Whether no finetune takes another batch."""
        return all(taken >= self.max_steps.get(name, sys.maxsize) for name, taken in self.taken.items())

    def state_dict(self) -> dict[str, Any]:
        own = {name: loader.state_dict() for name, loader in self.loaders.items()}
        return {"position": self.position, "taken": dict(self.taken), "loaders": own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position, self.taken = state["position"], dict(state["taken"])
        for name, own in state["loaders"].items():
            self.loaders[name].load_state_dict(own)
        self._resumed, self._own = True, {}

    def _batches(self, loader: PackedLoader, within: bool) -> Iterator[Batch]:
        """``within`` an epoch that is resumed, a finetune that has finished its own waits."""
        if not (within and loader.position >= len(loader)) or self.cycle:
            yield from loader
        while self.cycle:
            yield from loader


def _similar_together(rows: list[list[int]], lengths: Sequence[int], window: int) -> list[list[int]]:
    """Sorts rows by length within windows of ``window`` conversations, up and down by turns, so that where two
    windows meet rows are of similar length as well."""
    places: list[tuple[int, int]] = []
    seen = 0
    for row in rows:
        number = seen // window
        tokens = sum(lengths[index] for index in row)
        places.append((number, -tokens if number % 2 else tokens))
        seen += len(row)
    return [rows[number] for number in sorted(range(len(rows)), key=places.__getitem__)]


def split_evenly(rows: list[list[int]], num_batches: int) -> list[list[list[int]]]:
    """Cuts a list of rows into exactly ``num_batches`` runs of about equally many conversations, none empty."""
    total = sum(map(len, rows))
    batches: list[list[list[int]]] = [[]]
    done = 0
    for number, row in enumerate(rows):
        share_full = done + len(row) / 2 > len(batches) * total / num_batches
        needed_later = len(rows) - number <= num_batches - len(batches)
        if batches[-1] and len(batches) < num_batches and (share_full or needed_later):
            batches.append([])
        batches[-1].append(row)
        done += len(row)
    return batches

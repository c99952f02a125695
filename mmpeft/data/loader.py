"""The data loader: examples -> shuffled batches of packed rows, resumed exactly in the middle of an epoch."""

import random
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from mmpeft.data.batch import Batch, StepCounts, collate, concatenate
from mmpeft.data.counts import count, row_keys
from mmpeft.data.examples import Examples
from mmpeft.data.features import FeatureCache
from mmpeft.data.packing import PackedRow, pack, pack_choices
from mmpeft.data.plan import PackingConfig, Plan, plan_batches
from mmpeft.data.preferred import answers_of_another
from mmpeft.data.prefetch import ahead, default_workers
from mmpeft.data.records import Record
from mmpeft.data.sampling import mixed_order
from mmpeft.data.shares import Share
from mmpeft.data.template import ChoiceSet, Example
from mmpeft.data.unusable_image import naming_its_row
from mmpeft.hashing import seed_of

Features = Callable[[Sequence[Any]], Tensor | Sequence[Tensor]]
"""Images -> (images, image tokens, vision dim), or (image tokens, vision dim) of each."""

LOOKED_AT = 8
"""Batches that are packed to find the largest: before, it is not known what conversations of a row share."""


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
    return begin_batch(examples, rows, features, adapters)()


def begin_batch(
    examples: Sequence[Example] | Mapping[int, Example],
    rows: Sequence[Sequence[int]],
    features: Features,
    adapters: Sequence[str | None],
) -> Callable[[], Batch]:
    """What of `make_batch` needs no order among batches: tokens, and decoded images. What it gives ends the batch."""
    packed = [pack_row([examples[number] for number in row]) for row in rows]
    images = [image for row in packed for image in row.images]
    encode = features.begin(images) if isinstance(features, FeatureCache) else partial(features, images)
    return lambda: collate(packed, encode() if images else None, adapters, rows).pinned()


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
        workers: threads that make batches ahead; by default as the cores allow. The batches do not depend on it.
        share: whose rows of every batch are made.
        first: the process that is asked first, see `Share.of_rows`.
        step_of: (number of a batch, batches of an epoch) -> the numbers of all that are of the same step.
        mismatches: whether batches come with `Batch.mismatched`; every row is a `ChoiceSet` then.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        features: Features,
        packing: PackingConfig,
        adapter: str | None,
        seed: int | None,
        mix: Sequence[tuple[int, float]] | None = None,
        workers: int | None = None,
        share: Share = Share(),  # noqa: B008 never written to
        first: int = 0,
        step_of: Callable[[int, int], range] = lambda number, there: range(number, number + 1),
        mismatches: bool = False,
    ):
        self.examples = examples
        self.mix = mix
        self.features = features
        self.packing = packing
        self.adapter = adapter
        self.seed = seed
        self.workers = workers or default_workers()
        self.share, self.first, self.step_of, self.mismatches = share, first, step_of, mismatches
        self.epoch = 0
        self.position = 0
        self.counts = examples.counts if isinstance(examples, Examples) else count(examples)
        """What the plan knows of the examples."""
        self._keys = row_keys(self.counts)
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
        begin = partial(self._begin, self._plan, self.epoch)
        with closing(ahead(begin, range(self.position, len(self._plan)), self.workers)) as batches:
            for batch in batches:
                # before the yield: a checkpoint taken after this batch goes on with the next
                self.position += 1
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]
        self._resumed = True

    def packed_rows(self, batch: int) -> list[PackedRow]:
        """This process's rows of one batch of this epoch, before padding."""
        rows = self._plan[batch]
        return [pack_row([self.examples[number] for number in rows[own]]) for own in self._own(rows)]

    def largest_batch(self) -> list[PackedRow]:
        """This process's rows of that batch of this epoch where they have the most tokens, padding included."""
        largest = self._plan.largest(self.counts["tokens"], LOOKED_AT)
        padded = (self.packed_rows(number) for number in largest)
        return max(padded, key=lambda rows: len(rows) * max((len(row.ids) for row in rows), default=0))

    def batch(self, number: int) -> Batch:
        """One batch of this epoch, the rows of all processes."""
        return self._begin(self._plan, self.epoch, number, Share())()

    def _own(self, rows: Sequence[Sequence[int]], share: Share | None = None) -> list[int]:
        """Numbers of a batch's rows that are this process's."""
        tokens = [int(self.counts["tokens"][row].sum()) for row in rows]
        return (share or self.share).of_rows(tokens, self.first)

    def _begin(self, plan: Plan, epoch: int, number: int, share: Share | None = None) -> Callable[[], Batch]:
        """A batch's dropout has a seed of its own, so that a run drops the same however it came here: with other
        finetunes beside it, divided among processes, or resumed."""
        own = self._own(plan[number], share)
        rows = [plan[number][row] for row in own]
        begun = begin_batch(self.examples, rows, self.features, [self.adapter] * len(rows))
        others = self._mismatched(plan[number], own) if self.mismatches else None

        def end() -> Batch:
            with naming_its_row(self._records(rows)):
                batch = begun()
            if others is not None:
                features = batch.features if batch.image_tokens is None else batch.features_of_images
                batch.mismatched = collate(others, features, batch.adapters, rows).pinned()
            batch.row_numbers = np.array(own, np.int64)
            batch.of_step = {self.adapter: self._counts_of_step(plan, number)}
            if self.seed is not None and self.adapter is not None:
                batch.dropout_seeds = {self.adapter: seed_of("dropout", self.seed, epoch, number)}
            return batch

        return end

    def _mismatched(self, rows: Sequence[Sequence[int]], own: Sequence[int]) -> list[PackedRow] | None:
        """The questions of a batch's ``own`` rows, each with the answers of the next row; None of a single row."""
        if len(rows) < 2:
            return None
        most = self.packing.max_length
        asked = [(self.examples[rows[row][0]], self.examples[rows[(row + 1) % len(rows)][0]]) for row in own]
        return [pack_row([answers_of_another(*both, most)]) for both in asked]

    def _counts_of_step(self, plan: Plan, number: int) -> StepCounts:
        """Of all processes, and of all batches whose gradients are added up with this one's."""
        counts = self.counts[
            [example for each in self.step_of(number, len(plan)) for row in plan[each] for example in row]
        ]
        wrong = counts["carrying"].sum() - counts["right"].sum()
        alone = counts["alone"]
        choices = counts["conversations"][alone].sum()
        return StepCounts(int(counts["right"].sum()), int(wrong), int(alone.sum()), int(choices))

    def _records(self, rows: Sequence[Sequence[int]]) -> Iterator[Record]:
        if isinstance(self.examples, Examples):
            yield from (self.examples.records[number] for row in rows for number in row)

    def _plan_epoch(self) -> Plan:
        """Every epoch has the same number of batches."""
        lengths = self.counts["tokens"]
        if self.seed is None:
            return plan_batches(self._keys, lengths, self.packing)
        rng = random.Random(f"{self.seed} {self.epoch}")
        return plan_batches(self._keys, lengths, self.packing, self._order(rng), rng.shuffle)

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
        self.left: set[str] = set()
        """Those that left before their last batch."""
        self.position = 0
        self._resumed = False
        self._own: dict[str, Generator[Batch]] = {}

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
            names = [name for name in self.loaders if self._stays(name)]
            batches = {name: batch for name in names if (batch := next(self._own[name], None))}
            if not batches:
                return
            for name in batches:
                self.taken[name] += 1
            yield concatenate(list(batches.values())).pinned()

    def everybody_left(self) -> bool:
        """Whether no finetune takes another batch."""
        return not any(map(self._stays, self.loaders))

    def leave(self, name: str) -> None:
        """Makes no more batches of a finetune, from the next batch on."""
        self.left.add(name)
        if name in self._own:
            self._own[name].close()

    def _stays(self, name: str) -> bool:
        return name not in self.left and self.taken[name] < self.max_steps.get(name, sys.maxsize)

    def state_dict(self) -> dict[str, Any]:
        own = {name: loader.state_dict() for name, loader in self.loaders.items()}
        return {"position": self.position, "taken": dict(self.taken), "loaders": own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position, self.taken = state["position"], dict(state["taken"])
        for name, own in state["loaders"].items():
            self.loaders[name].load_state_dict(own)
        self._resumed, self._own = True, {}

    def _batches(self, loader: PackedLoader, within: bool) -> Generator[Batch]:
        """``within`` an epoch that is resumed, a finetune that has finished its own waits."""
        if not (within and loader.position >= len(loader)) or self.cycle:
            yield from loader
        while self.cycle:
            yield from loader

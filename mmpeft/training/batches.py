"""The data loaders of a run, second step of its data: records -> batches, once template and features are there."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from mmpeft.data.batch import Batch
from mmpeft.data.examples import Counted, Examples
from mmpeft.data.layouts.notes import Notes
from mmpeft.data.loader import Features, JointLoader, PackedLoader
from mmpeft.data.plan import PackingConfig
from mmpeft.data.preferred import Sides
from mmpeft.data.prefetch import default_workers
from mmpeft.data.shares import Share
from mmpeft.data.template import Template
from mmpeft.errors import RefusedError
from mmpeft.training.finetune import Finetune, Split

Loader = PackedLoader | JointLoader


class Batches:
    """The batches of a run's finetunes.

    Args:
        finetunes: with their records.
        template: turns a record into tokens.
        features: of images.
        packing: how examples fill rows and batches.
        adapters: finetune -> the adapter of its rows; None is the base.
        seed: of the order of training, and of dropout.
        cycle: whether training ends by steps, see `JointLoader`.
        skipped: is told of training rows that cannot be learnt from; None refuses them.
        workers: threads that make batches ahead, of all finetunes; None is `default_workers`.
        trainer: Lightning's, whose batches become steps and are divided among its processes; None has neither.
    """

    def __init__(
        self,
        finetunes: Mapping[str, Finetune],
        template: Template,
        features: Features,
        packing: PackingConfig,
        adapters: Mapping[str, str | None],
        seed: int,
        cycle: bool,
        workers: int | None = None,
        skipped: Notes | None = None,
        trainer: Any = None,
    ):
        self.finetunes, self.seed, self.cycle, self.trainer = finetunes, seed, cycle, trainer
        self.workers, self.skipped = workers, skipped
        self._how = template, features, packing, adapters
        self._train: Loader | None = None
        self._val: Loader | None = None

    def train(self) -> Loader:
        """One loader for the whole training: it knows where it stands."""
        if self._train is None:
            self._train = make_loader(
                *(self.finetunes, "train", *self._how, self.seed, self.cycle, self.workers, self.skipped),
                self.trainer,
            )
        assert self._train is not None, "a fit without training data was refused"
        return self._train

    def val(self) -> Loader | list:
        """Empty where no finetune has validation data."""
        self._val = make_loader(self.finetunes, "val", *self._how, workers=self.workers, trainer=self.trainer)
        return self._val or []

    def leave(self, name: str) -> None:
        """Makes no more batches of a finetune, neither of training nor of validation."""
        for loader in (self._train, self._val):
            if isinstance(loader, JointLoader):
                loader.leave(name)

    def some(self, name: str, number: int) -> list[Batch]:
        """The first batches of a finetune's training data, without taking them from its epoch."""
        own = loader_of(self.train(), name)
        return [own.batch(index) for index in range(min(number, len(own)))]


def make_loader(
    finetunes: Mapping[str, Finetune],
    split: Split,
    template: Template,
    features: Features,
    packing: PackingConfig,
    adapters: Mapping[str, str | None],
    seed: int | None = None,
    cycle: bool = False,
    workers: int | None = None,
    skipped: Notes | None = None,
    trainer: Any = None,
) -> Loader | None:
    """The batches of a split; None where no finetune has records of it. Finetunes go on with the records that are in
    them.

    Args:
        finetunes: with their records.
        split: which records.
        template: turns a record into tokens.
        features: of images.
        packing: how examples fill rows and batches.
        adapters: finetune -> the adapter of its rows; None is the base.
        seed: of the order, and of dropout, where a finetune has none of its own; None keeps that of the data and
            leaves ``mix`` and ``max_steps`` out.
        cycle: see `JointLoader`.
        workers: threads that make batches ahead, shared out among the finetunes.
        skipped: is told of records that cannot be encoded; None refuses them.
        trainer: see `Batches`.
    """
    share = Share() if trainer is None else Share(trainer.global_rank, trainer.world_size)
    each = max(1, (workers or default_workers()) // len(finetunes))
    counted: dict[tuple[int, bool | Sides], Counted] = {}
    loaders: dict[str, PackedLoader] = {}
    for name, finetune in finetunes.items():
        if records := finetune.records.get(split):
            if finetune.learns_from_labels and packing.batch_size < 2:
                raise RefusedError(
                    f"data.packing.batch_size is {packing.batch_size}, but kto compares the answers of a batch with "
                    "those to its other questions: set it to at least 2"
                )
            examples = Examples(records, template, finetune.learns_from_choices, split, counted, skipped)
            finetune.keep(split, examples.records)
            mix = finetune.mix if seed is not None else None
            own = finetune.seed if seed is not None and finetune.seed is not None else seed
            loaders[name] = PackedLoader(
                *(examples, features, packing, adapters[name], own, mix, each, share, len(loaders)),
                partial(batches_of_step, trainer),
                finetune.learns_from_labels,
            )
    if truncated := sum(int(own.counts["truncated"].sum()) for own in counted.values()):
        total = sum(len(own.counts) for own in counted.values())
        print(f"{split}: {truncated} of {total} conversations were cut at max_length")
    limits = {} if seed is None else {name: own.max_steps for name, own in finetunes.items() if own.max_steps}
    if len(loaders) > 1 or limits:
        return JointLoader(loaders, limits, cycle)
    return next(iter(loaders.values()), None)


def loader_of(loader: Loader, name: str) -> PackedLoader:
    """A finetune's own part."""
    return loader.loaders[name] if isinstance(loader, JointLoader) else loader


def longest_answer(loader: Loader) -> int:
    """Tokens of the longest answer, without its end."""
    loaders = loader.loaders.values() if isinstance(loader, JointLoader) else [loader]
    return max((int(own.counts["answer"].max()) for own in loaders), default=0)


def total_steps(finetune: Finetune, loader: Loader, trainer: Any) -> int:
    """Optimiser steps that a finetune will take.

    Not Lightning's ``estimated_stepping_batches``: where training ends by epochs that sets the loaders up before
    a checkpoint's state is there for them, and a resumed run would begin its epoch again (2.6.6).
    """
    most = [trainer.max_steps] if trainer.max_steps > 0 else []
    if finetune.max_steps:
        most.append(finetune.max_steps)
    if not ends_by_steps(trainer):
        own = loader_of(loader, finetune.name)
        batches = batches_of_epoch(len(own), trainer)
        most.append(trainer.max_epochs * math.ceil(batches / trainer.accumulate_grad_batches))
    if not most:
        raise RefusedError("the run has no end: set trainer.max_steps or trainer.max_epochs")
    return max(1, min(most))


def steps_of_run(finetunes: Mapping[str, Finetune], loader: Loader, trainer: Any) -> int:
    """Of the finetune that has the most; as `total_steps`."""
    return max(total_steps(own, loader, trainer) for own in finetunes.values())


def batches_of_epoch(there: int, trainer: Any) -> int:
    """How many of so many batches Lightning takes in an epoch."""
    limit = trainer.limit_train_batches
    return min(there, limit) if isinstance(limit, int) else int(there * (limit or 1.0))


def batches_of_step(trainer: Any, number: int, there: int) -> range:
    """The batches of an epoch of so many whose gradients Lightning adds up with those of this one."""
    if trainer is None:
        return range(number, number + 1)
    each = trainer.accumulate_grad_batches
    start = number // each * each
    return range(start, max(number + 1, min(start + each, batches_of_epoch(there, trainer))))


def ends_by_steps(trainer: Any) -> bool:
    """Whether no number of epochs ends the training."""
    return trainer is not None and trainer.max_epochs in (None, -1)

"""The losses of a step, finetune by finetune: what is summed, what is logged, and whose gradients are taken."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmpeft.data.batch import Batch, Conversations, StepCounts
from mmpeft.models.token_losses import TokenLosses
from mmpeft.training.finetune import Finetune
from mmpeft.training.objectives import Sum, exactly_right, in_answers, rank_accuracy
from mmpeft.training.preferences import LABELS, MEASURES, PAIRS
from mmpeft.training.references import Beside
from mmpeft.transfer import to_host

COUNTED: dict[str, Callable[[StepCounts], int]] = {
    "lm": lambda counts: counts.answers,
    "unlikelihood": lambda counts: counts.wrong,
    "length_normalised": lambda counts: counts.questions,
    PAIRS: lambda counts: counts.choices - counts.questions,
    LABELS: lambda counts: counts.choices,
}
"""Term of a loss -> what it is the mean over."""
TERMS = tuple(COUNTED)
SUMMED = (*TERMS, *MEASURES)
Terms = dict[tuple[str, str], Sum]
"""(finetune, one of `SUMMED`) -> its sum"""
ALONE = Beside()
RIGHT = ("val_exact_match", "val_rank_accuracy")
"""Curves of shares of right answers."""


class Logged(NamedTuple):
    """One number for the curves."""

    metric: str
    finetune: str
    value: Tensor | float
    batch_size: int


@dataclass
class StepSums:
    """What rows of a step add up to."""

    tokens: Counter[str] = field(default_factory=Counter)
    """Finetune -> what its losses are summed over: tokens of its answers, or pairs or answers of `Kind.first_term`;
    those without rows are not in it."""
    with_images: Counter[str] = field(default_factory=Counter)
    """Finetune -> batches in which it had rows with images."""
    terms: Terms = field(default_factory=dict)
    conversations: int = 0

    def add(self, other: "StepSums") -> None:
        self.tokens.update(other.tokens)
        self.with_images.update(other.with_images)
        self.conversations += other.conversations
        for key, (total, count) in other.terms.items():
            own = self.terms.get(key)
            self.terms[key] = Sum(total, count) if own is None else Sum(own.total + total, own.count + count)


class StepLosses:
    """Turns the token losses of batches into what each finetune learns from, and keeps count until the optimiser steps.

    Args:
        finetunes: of the run.
        adapters: finetune -> the adapter of its rows; None is the base.
        of_all: numbers of this process -> their sums over all processes.
    """

    def __init__(
        self,
        finetunes: Mapping[str, Finetune],
        adapters: Mapping[str, str | None],
        of_all: Callable[[Sequence[float]], list[float]] = list,
    ):
        self.finetunes, self.adapters, self.of_all = finetunes, adapters, of_all
        self._of_adapter = {adapter: name for name, adapter in adapters.items()}
        self.sums = StepSums()
        """Of the step so far, in this process; of all once they were reduced."""
        self._told = list(finetunes)
        self._validated: list[Terms] = []
        self._correct: dict[tuple[str, str], list[Tensor]] = {}
        self.stepped: list[str] = []
        """The finetunes that had rows in the step whose gradients were taken last."""

    def train(self, batch: Batch, losses: TokenLosses, beside: Beside = ALONE) -> tuple[Tensor, StepSums]:
        """The sum over answers' tokens (or pairs), which `take_gradients` makes the mean over all of the step: exact,
        however a step is divided. Of further terms the batch says what they are means over.

        Returns:
            The loss, and what is to be added to `sums` once it has its gradient.
        """
        with_images = {batch.adapters[row] for row in batch.on_host.image_rows}
        total, sums = losses.nll.new_zeros((), requires_grad=True), StepSums()
        for finetune, own, conversations, reference in self._by_finetune(batch, losses, beside.losses):
            name, adapter = finetune.name, self.adapters[finetune.name]
            terms = finetune.settings.terms(own, reference, conversations, beside.points.get(name))
            of_step, first = batch.of_step.get(adapter), finetune.settings.kind.first_term
            whole = {
                term: terms[term].count if of_step is None else count(of_step)
                for term, count in COUNTED.items()
                if term in terms
            }
            for term, count in whole.items():
                # summed as they are where they can be: a mean times its number would round
                total = total + (
                    terms[term].total if term == first else terms[term].total * (whole[first] / max(1, count))
                )
            sums.terms |= {(name, term): Sum(each.total.detach(), each.count) for term, each in terms.items()}
            if len(conversations.rows):
                sums.tokens[name] = terms[first].count
            sums.with_images[name] = int(adapter in with_images)
        if not batch.adapters:
            total = total + losses.nll.sum()  # nothing, but its backward may be waited for
        sums.conversations = batch.conversations.num_examples
        return total, sums

    def take_gradients(self, accumulated: int) -> None:
        """Gives every finetune that had rows the gradient of its own token mean, of a loss that was divided by
        ``accumulated`` batches. The others have none since the optimiser's ``zero_grad``."""
        self.stepped = [name for name in self.finetunes if name in self.sums.tokens]
        for name in self.stepped:
            if (parameters := self.finetunes[name].parameters) is not None:
                images = self.sums.with_images[name] > 0
                parameters.take_gradients(self.sums.tokens[name] / accumulated, images)

    def logged(self) -> list[Logged]:
        """The curves of the step, whose sums end with it."""
        sums, self.sums = self.sums, StepSums()
        logged = []
        for name in self.stepped:
            terms = {term: sums.terms[name, term].mean for term in TERMS if (name, term) in sums.terms}
            loss, tokens = torch.stack(list(terms.values())).sum(), max(1, sums.tokens[name])
            logged.append(Logged("train_loss", name, loss, tokens))
            if len(terms) > 1:
                logged += [Logged(f"train_{term}", name, mean, tokens) for term, mean in terms.items()]
            logged += _rewards(
                "train", name, {m: sums.terms[name, m] for m in MEASURES if (name, m) in sums.terms}
            )
        told, self._told = self._told, self.stepped
        # Lightning would repeat the last value of a finetune that has left
        logged += [Logged("train_loss", name, torch.nan, 1) for name in told if name not in self._told]
        return logged

    def validate(self, batch: Batch, losses: TokenLosses, beside: Beside = ALONE) -> None:
        """Keeps the losses of a batch, and whether its answers are right, for `val_losses` and `accuracies`."""
        terms: Terms = {}
        for finetune, own, conversations, reference in self._by_finetune(batch, losses, beside.losses):
            answers, name = own.where(in_answers(own, conversations)), finetune.name
            found = finetune.settings.terms(own, reference, conversations, beside.points.get(name))
            terms |= {(name, term): each for term, each in found.items()}
            correct = exactly_right(answers), rank_accuracy(own, conversations)
            for metric, each in zip(RIGHT, correct, strict=True):
                self._correct.setdefault((metric, name), []).append(each)
        self._validated.append(terms)

    def val_losses(self) -> list[Logged]:
        """The mean over the batches since the last call, weighed by what they are summed over; of preferences the
        rewards beside it. Of all processes."""
        kept, self._validated = self._validated, []
        keys = [(name, term) for name in self.finetunes for term in SUMMED]
        every = [each.get(key) for each in kept for key in keys]
        totals = to_host([own.total if own else 0.0 for own in every])
        found = self.of_all([*totals, *(own.count if own else 0 for own in every)])
        sums, counts = np.array(found).reshape(2, len(kept), len(self.finetunes), len(SUMMED))
        means = (sums / np.maximum(counts, 1))[:, :, : len(TERMS)].sum(2)
        logged: list[Logged] = []
        for number, (name, finetune) in enumerate(self.finetunes.items()):
            weights = counts[:, number, TERMS.index(finetune.settings.kind.first_term)]
            if not (whole := int(weights.sum())):
                continue
            loss = float((means[:, number] * weights).sum() / whole)
            measures = {
                measure: Sum(torch.tensor(sums[:, number, place].sum()), int(counts[:, number, place].sum()))
                for place, measure in enumerate(SUMMED)
                if measure in MEASURES
            }
            rewards = _rewards("val", name, measures)
            logged.append(Logged("val_loss", name, loss, whole))
            logged += [each._replace(value=float(each.value)) for each in rewards]
        return logged

    def accuracies(self) -> list[Logged]:
        """Shares of right answers since the last call, of all processes."""
        kept, self._correct = self._correct, {}
        joined = {key: torch.cat(parts) for key, parts in kept.items()}
        right = dict(zip(joined, to_host([own.sum() for own in joined.values()]), strict=True))
        keys = [(metric, name) for name in self.finetunes for metric in RIGHT]
        found = self.of_all(
            [*(right.get(key, 0) for key in keys), *(len(joined.get(key, ())) for key in keys)]
        )
        rights, numbers = found[: len(keys)], found[len(keys) :]
        return [
            Logged(*key, count / number, int(number))
            for key, count, number in zip(keys, rights, numbers, strict=True)
            if number
        ]

    def _by_finetune(
        self, batch: Batch, losses: TokenLosses, reference: TokenLosses | None
    ) -> Iterator[tuple[Finetune, TokenLosses, Conversations, TokenLosses | None]]:
        """Each finetune of a batch with what is its own of it; a single one has all of it."""
        table = batch.conversations
        if len(self.finetunes) == 1:
            (single,) = self.finetunes.values()
            yield single, losses, table, reference
            return
        names = [self._of_adapter.get(adapter) for adapter in batch.adapters]
        for name in dict.fromkeys(name for name in names if name is not None):
            own = np.array([other == name for other in names])
            beside = None if reference is None else reference.where(own[reference.rows])
            yield self.finetunes[name], losses.where(own[losses.rows]), table.where(own[table.rows]), beside


def _rewards(split: str, name: str, measures: Mapping[str, Sum]) -> list[Logged]:
    """The curves of preferences: by how much the chosen answers' reward is above the rejected ones', and how often."""
    told = {measure: own.mean for measure, own in measures.items() if own.count}
    if "reward_accuracy" not in told:
        return []
    number = measures["reward_accuracy"].count
    logged = [Logged(f"{split}_reward_accuracy", name, told["reward_accuracy"], number)]
    if len(told) == len(MEASURES):  # a batch of KTO may have labels of one kind alone
        margin = told["chosen_reward"] - told["rejected_reward"]
        logged.append(Logged(f"{split}_reward_margin", name, margin, number))
    return logged

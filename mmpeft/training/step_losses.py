"""The losses of a step, finetune by finetune: what is summed, what is logged, and whose gradients are taken."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmpeft.data.batch import Batch, Conversations
from mmpeft.models.token_losses import TokenLosses
from mmpeft.training.finetune import Finetune
from mmpeft.training.objectives import exactly_right, in_answers, objective, rank_accuracy
from mmpeft.transfer import to_host


class Logged(NamedTuple):
    """One number for the curves."""

    metric: str
    finetune: str
    value: Tensor | float
    batch_size: int


class StepLosses:
    """Turns the token losses of batches into what each finetune learns from, and keeps count until the optimiser steps.

    Args:
        finetunes: of the run.
        adapters: finetune -> the adapter of its rows; None is the base.
    """

    def __init__(self, finetunes: Mapping[str, Finetune], adapters: Mapping[str, str | None]):
        self.finetunes, self.adapters = finetunes, adapters
        self._of_adapter = {adapter: name for name, adapter in adapters.items()}
        self._tokens: Counter[str] = Counter()
        self._with_images: set[str] = set()
        self._told = list(finetunes)
        self._correct: dict[tuple[str, str], list[Tensor]] = {}
        self.stepped: list[str] = []
        """The finetunes that had rows in the step whose gradients were taken last."""

    def train(self, batch: Batch, losses: TokenLosses) -> tuple[Tensor, list[Logged]]:
        """The sum over answers' tokens, which `take_gradients` makes the mean over all tokens of the step: that stays
        exact when micro-batches of different length are accumulated (the terms that come from wrong choices are then
        averaged by the tokens of the right ones)."""
        with_images = {batch.adapters[row] for row in batch.on_host.image_rows}
        total, logged = losses.nll.new_zeros(()), []
        for finetune, own, conversations in self._by_finetune(batch, losses):
            name, tokens = finetune.name, int(in_answers(own, conversations).sum())
            self._tokens[name] += tokens
            self._with_images |= {name} if self.adapters[name] in with_images else set()
            terms: dict[str, Tensor] = {}
            if tokens == len(own.nll):  # summed as they are: a mean times its number would round
                loss = own.nll.sum()
            else:
                terms = objective(own, None, conversations, finetune.settings.choice_losses)
                loss = tokens * torch.stack(list(terms.values())).sum()
            total = total + loss
            mean = loss.detach() / tokens if tokens else torch.nan
            logged.append(Logged("train_loss", name, mean, max(1, tokens)))
            logged += [Logged(f"train_{term}", name, own.detach(), tokens) for term, own in terms.items()]
        told, self._told = self._told, [each.finetune for each in logged]
        # Lightning would repeat the last value of a finetune that has left
        logged += [Logged("train_loss", name, torch.nan, 1) for name in told if name not in self._told]
        return total, logged

    def take_gradients(self, accumulated: int) -> None:
        """Gives every finetune that had rows the gradient of its own token mean, of a loss that was divided by
        ``accumulated`` batches. The others have none since the optimiser's ``zero_grad``."""
        for name, tokens in self._tokens.items():
            if (parameters := self.finetunes[name].parameters) is not None:
                parameters.take_gradients(tokens / accumulated, name in self._with_images)
        self.stepped = list(self._tokens)
        self._tokens.clear()
        self._with_images.clear()

    def validate(self, batch: Batch, losses: TokenLosses) -> list[Logged]:
        """The losses of a batch; whether its answers are right is kept for `accuracies`."""
        logged = []
        for finetune, own, conversations in self._by_finetune(batch, losses):
            answers, name = own.where(in_answers(own, conversations)), finetune.name
            if tokens := len(answers.nll):
                terms = objective(own, None, conversations, finetune.settings.choice_losses)
                logged.append(Logged("val_loss", name, torch.stack(list(terms.values())).sum(), tokens))
            right = {
                "val_exact_match": exactly_right(answers),
                "val_rank_accuracy": rank_accuracy(own, conversations),
            }
            for metric, correct in right.items():
                self._correct.setdefault((metric, name), []).append(correct)
        return logged

    def accuracies(self) -> list[Logged]:
        """Shares of right answers since the last call."""
        kept, self._correct = self._correct, {}
        joined = {key: own for key, parts in kept.items() if len(own := torch.cat(parts))}
        right = to_host([own.sum() for own in joined.values()])
        return [
            Logged(*key, count / len(own), len(own))
            for (key, own), count in zip(joined.items(), right, strict=True)
        ]

    def _by_finetune(
        self, batch: Batch, losses: TokenLosses
    ) -> Iterator[tuple[Finetune, TokenLosses, Conversations]]:
        """Each finetune of a batch with what is its own of it; a single one has all of it."""
        table = batch.conversations
        if len(self.finetunes) == 1:
            yield *self.finetunes.values(), losses, table
            return
        names = [self._of_adapter.get(adapter) for adapter in batch.adapters]
        for name in dict.fromkeys(name for name in names if name is not None):
            own = np.array([other == name for other in names])
            yield self.finetunes[name], losses.where(own[losses.rows]), table.where(own[table.rows])

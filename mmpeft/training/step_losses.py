"""The losses of a step, finetune by finetune: what is summed, what is logged, and whose gradients are taken."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mmpeft.data.batch import Batch, Conversations
from mmpeft.models.token_losses import TokenLosses
from mmpeft.training.finetune import Finetune
from mmpeft.training.objectives import exactly_right, in_answers, objective, rank_accuracy


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
        self._tokens: Counter[str] = Counter()
        self._with_images: set[str] = set()
        self._correct: dict[tuple[str, str], list[bool]] = {}

    def train(self, batch: Batch, losses: TokenLosses) -> tuple[Tensor, list[Logged]]:
        """The sum over answers' tokens, which `take_gradients` makes the mean over all tokens of the step: that stays
        exact when micro-batches of different length are accumulated (the terms that come from wrong choices are then
        averaged by the tokens of the right ones)."""
        with_images = {batch.adapters[row] for row in batch.image_rows.tolist()}
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
            # NaN where it has no tokens: Lightning would repeat the last value of a finetune that has left
            mean = loss.detach() / tokens if tokens else torch.nan
            logged.append(Logged("train_loss", name, mean, max(1, tokens)))
            logged += [Logged(f"train_{term}", name, own.detach(), tokens) for term, own in terms.items()]
        return total, logged

    def take_gradients(self, accumulated: int) -> None:
        """Gives every finetune the gradient of its own token mean; the loss was divided by ``accumulated`` batches."""
        for name, finetune in self.finetunes.items():
            if finetune.parameters is not None:
                finetune.parameters.take_gradients(
                    self._tokens[name] / accumulated, name in self._with_images
                )
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
                "val_exact_match": list(exactly_right(answers).values()),
                "val_rank_accuracy": rank_accuracy(own, conversations),
            }
            for metric, correct in right.items():
                self._correct.setdefault((metric, name), []).extend(correct)
        return logged

    def accuracies(self) -> list[Logged]:
        """Shares of right answers since the last call."""
        correct, self._correct = self._correct, {}
        return [Logged(*key, sum(own) / len(own), len(own)) for key, own in correct.items() if own]

    def _by_finetune(
        self, batch: Batch, losses: TokenLosses
    ) -> Iterator[tuple[Finetune, TokenLosses, Conversations]]:
        """Each finetune with what is its own of a batch; a single one has all of it."""
        for name, finetune in self.finetunes.items():
            if len(self.finetunes) == 1:
                yield finetune, losses, batch.conversations
                continue
            owned = [owner == self.adapters[name] for owner in batch.adapters]
            mask, table = torch.tensor(owned, device=losses.rows.device), batch.conversations
            yield finetune, losses.where(mask[losses.rows]), table.where(mask[table.rows])

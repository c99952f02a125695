"""Objectives (loss functions): what is learnt from the losses of tokens, of policy, reference and conversations.

A term takes the losses of the trained model (the policy), those of a reference on the same tokens or None, and the
conversations they belong to, and gives a sum and what it is to be the mean over: a step may be divided into batches and
among processes, whose sums add up where their means do not. T-Few's ``L_LM + L_UL + L_LN`` for questions with choices,
plain ``L_LM`` for all others.

Source: Liu et al. 2022, section 3.2. Their code adds `FLOOR` inside the logarithm of the unlikelihood loss, which
bounds its gradient where a wrong answer is certain; so does this one. It also counts padding and right answers there,
which adds a constant without gradient; this one does not.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmpeft.data.batch import Conversations
from mmpeft.data.packing import PREFIX, Role
from mmpeft.errors import RefusedError
from mmpeft.models.token_losses import TokenLosses, length_normalised
from mmpeft.transfer import to_device

FLOOR = 1e-2
SEGMENTS = 2**20
"""More than a row can have: makes one number of row and segment."""


class Sum(NamedTuple):
    """Of tokens or questions."""

    total: Tensor
    """scalar"""
    count: int
    """How many there are."""

    @property
    def mean(self) -> Tensor:
        return self.total / self.count if self.count else torch.full_like(self.total, torch.nan)


Term = Callable[[TokenLosses, TokenLosses | None, Conversations], Sum]
"""(policy, reference, conversations) -> its sum"""


@dataclass
class ChoiceLosses:
    """Weights of what is learnt from the choices beside the right answer's tokens; both 0 trains on the right answer
    alone, as if there were no choices."""

    unlikelihood: float = 1.0
    """L_UL: the tokens of wrong choices are to become unlikely."""
    length_normalised: float = 1.0
    """L_LN: the right choice is to have the highest mean log-probability."""

    def __post_init__(self):
        for name, value in vars(self).items():
            if not 0 <= value < math.inf:
                raise RefusedError(f"choice_losses.{name} is {value}; it must be at least 0")

    @property
    def wanted(self) -> bool:
        """Whether wrong choices are looked at."""
        return self.unlikelihood > 0 or self.length_normalised > 0


def in_answers(losses: TokenLosses, conversations: Conversations) -> np.ndarray:
    """(labelled,) bool: which tokens are of answers; the others are of choices that are not the right one."""
    answers = (conversations.roles == Role.ANSWER) | (conversations.roles == Role.RIGHT)
    return _of(losses, conversations.where(answers))


def language_modelling(
    policy: TokenLosses, reference: TokenLosses | None, conversations: Conversations
) -> Sum:
    """L_LM: the mean over the tokens of all right answers."""
    nll = policy.where(in_answers(policy, conversations)).nll
    return Sum(nll.sum(), len(nll))


def unlikelihood(policy: TokenLosses, reference: TokenLosses | None, conversations: Conversations) -> Sum:
    """L_UL: the mean of ``-log(1 - p + FLOOR)`` over the tokens of all wrong choices."""
    wrong = policy.where(_of(policy, conversations.where(conversations.roles == Role.WRONG)))
    return Sum(-torch.log1p(FLOOR - torch.exp(-wrong.nll)).sum(), len(wrong.nll))


def length_normalised_choice(
    policy: TokenLosses, reference: TokenLosses | None, conversations: Conversations
) -> Sum:
    """L_LN: cross-entropy of the right choice among the mean log-probabilities of all, mean over questions."""
    scores, right = _scores_of_choices(policy, conversations)
    return Sum(F.cross_entropy(scores, right, reduction="sum"), len(right))


CHOICE_TERMS: dict[str, Term] = {
    "unlikelihood": unlikelihood,
    "length_normalised": length_normalised_choice,
}
"""The terms that `ChoiceLosses` weighs, by its fields."""


def objective(
    policy: TokenLosses, reference: TokenLosses | None, conversations: Conversations, weights: ChoiceLosses
) -> dict[str, Sum]:
    """The loss terms of one finetune's rows of a batch, each with its weight.

    Args:
        policy: losses of the tokens of those rows.
        reference: of the same tokens by another model, for terms that compare with one.
        conversations: of those rows.
        weights: of the terms.

    Returns:
        Name -> its sum; the loss is the sum of their means. Rows without choices have "lm" alone.
    """
    terms = {"lm": language_modelling(policy, reference, conversations)}
    if (conversations.roles == Role.RIGHT).any():
        for name, term in CHOICE_TERMS.items():
            if weight := getattr(weights, name):
                total, count = term(policy, reference, conversations)
                terms[name] = Sum(weight * total, count)
    return terms


def exactly_right(losses: TokenLosses) -> Tensor:
    """(conversations,) bool, by row and segment: whether every labelled token was the most likely one (the argmax).

    Greedy decoding would then have written exactly this answer, and any other otherwise: as long as it has
    written the answer's beginning, it stands where the labels stand.
    """
    conversations, numbers = np.unique(keys_of(losses), return_inverse=True)
    wrong = torch.zeros(len(conversations), device=losses.correct.device)
    return wrong.index_add(0, to_device(numbers, wrong.device), (~losses.correct).float()) == 0


def rank_accuracy(losses: TokenLosses, conversations: Conversations) -> Tensor:
    """(questions with a right choice,) bool: whether that is the most likely one per token."""
    if not (conversations.roles == Role.RIGHT).any():
        return losses.correct.new_empty(0)
    scores, right = _scores_of_choices(losses, conversations)
    return scores.argmax(1) == right


def _scores_of_choices(losses: TokenLosses, conversations: Conversations) -> tuple[Tensor, Tensor]:
    """The mean log-probabilities (questions, choices) where one is right and others are not, and (questions,) int64
    which that is."""
    roles, rows, device = conversations.roles, conversations.rows, losses.nll.device
    right = conversations.where((roles == Role.RIGHT) & np.isin(rows, rows[roles == Role.WRONG]))
    scores = length_normalised(losses, int(conversations.rows.max()) + 1)
    return scores.index_select(0, to_device(right.rows, device)), to_device(
        right.segments - PREFIX - 1, device
    )


def _of(losses: TokenLosses, conversations: Conversations) -> np.ndarray:
    """(labelled,) bool: which tokens belong to these conversations."""
    return np.isin(keys_of(losses), keys_of(conversations))


def keys_of(places: TokenLosses | Conversations) -> np.ndarray:
    """Row and segment as one number."""
    return places.rows * SEGMENTS + places.segments

"""Objectives (loss functions): what is learnt from the losses of tokens, of policy, reference and conversations.

A term takes the losses of the trained model (the policy), those of a reference on the same tokens or None, and the
conversations they belong to, and gives a scalar. T-Few's ``L_LM + L_UL + L_LN`` for questions with choices, plain
``L_LM`` for all others.

Source: Liu et al. 2022, section 3.2. Their code adds `FLOOR` inside the logarithm of the unlikelihood loss, which
bounds its gradient where a wrong answer is certain; so does this one. It also counts padding and right answers there,
which adds a constant without gradient; this one does not.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mmpeft.data.batch import Conversations
from mmpeft.data.packing import PREFIX, Role
from mmpeft.errors import RefusedError
from mmpeft.models.token_losses import TokenLosses, length_normalised

FLOOR = 1e-2
SEGMENTS = 2**20
"""More than a row can have: makes one number of row and segment."""
Term = Callable[[TokenLosses, TokenLosses | None, Conversations], Tensor]
"""(policy, reference, conversations) -> scalar"""


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


def in_answers(losses: TokenLosses, conversations: Conversations) -> Tensor:
    """(labelled,) bool: which tokens are of answers; the others are of choices that are not the right one."""
    answers = (conversations.roles == Role.ANSWER) | (conversations.roles == Role.RIGHT)
    return _of(losses, conversations.where(answers))


def language_modelling(
    policy: TokenLosses, reference: TokenLosses | None, conversations: Conversations
) -> Tensor:
    """L_LM: the mean over the tokens of all right answers."""
    return policy.nll[in_answers(policy, conversations)].mean()


def unlikelihood(policy: TokenLosses, reference: TokenLosses | None, conversations: Conversations) -> Tensor:
    """L_UL: the mean of ``-log(1 - p + FLOOR)`` over the tokens of all wrong choices."""
    wrong = policy.nll[_of(policy, conversations.where(conversations.roles == Role.WRONG))]
    return -torch.log1p(FLOOR - torch.exp(-wrong)).mean()


def length_normalised_choice(
    policy: TokenLosses, reference: TokenLosses | None, conversations: Conversations
) -> Tensor:
    """L_LN: cross-entropy of the right choice among the mean log-probabilities of all, mean over questions."""
    right = conversations.where(conversations.roles == Role.RIGHT)
    scores = length_normalised(policy, int(conversations.rows.max()) + 1)[right.rows]
    return F.cross_entropy(scores, right.segments - PREFIX - 1)


CHOICE_TERMS: dict[str, Term] = {
    "unlikelihood": unlikelihood,
    "length_normalised": length_normalised_choice,
}
"""The terms that `ChoiceLosses` weighs, by its fields."""


def objective(
    policy: TokenLosses, reference: TokenLosses | None, conversations: Conversations, weights: ChoiceLosses
) -> dict[str, Tensor]:
    """The loss terms of one finetune's rows of a batch, each with its weight.

    Args:
        policy: losses of the tokens of those rows.
        reference: of the same tokens by another model, for terms that compare with one.
        conversations: of those rows.
        weights: of the terms.

    Returns:
        Name -> scalar; their sum is the loss. Rows without choices have "lm" alone.
    """
    terms = {"lm": language_modelling(policy, reference, conversations)}
    if bool((conversations.roles == Role.RIGHT).any()):
        for name, term in CHOICE_TERMS.items():
            if weight := getattr(weights, name):
                terms[name] = weight * term(policy, reference, conversations)
    return terms


def exactly_right(losses: TokenLosses) -> dict[tuple[int, int], bool]:
    """Per conversation (row, segment), whether every labelled token was the most likely one (the argmax).

    Greedy decoding would then have written exactly this answer, and any other otherwise: as long as it has
    written the answer's beginning, it stands where the labels stand.
    """
    conversations: dict[tuple[int, int], bool] = {}
    for row, segment, right in zip(
        losses.rows.tolist(), losses.segments.tolist(), losses.correct.tolist(), strict=True
    ):
        conversations[row, segment] = conversations.get((row, segment), True) and right
    return conversations


def rank_accuracy(losses: TokenLosses, conversations: Conversations) -> list[bool]:
    """Of every question with a right choice, whether that is the most likely one per token."""
    right = conversations.where(conversations.roles == Role.RIGHT)
    if not len(right.rows):
        return []
    best = length_normalised(losses, int(conversations.rows.max()) + 1)[right.rows].argmax(1)
    return (best == right.segments - PREFIX - 1).tolist()


def _of(losses: TokenLosses, conversations: Conversations) -> Tensor:
    """(labelled,) bool: which tokens belong to these conversations."""
    keys = conversations.rows * SEGMENTS + conversations.segments
    return torch.isin(losses.rows * SEGMENTS + losses.segments, keys)

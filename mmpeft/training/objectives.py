"""What is made of the tokens' losses: the T-Few objective ``L_LM + L_UL + L_LN`` for questions with choices, plain
``L_LM`` for all others, and whether answers are right.

Source: Liu et al. 2022, section 3.2. Their code adds `FLOOR` inside the logarithm of the unlikelihood loss, which
bounds its gradient where a wrong answer is certain; so does this one. It also counts padding and right answers there,
which adds a constant without gradient; this one does not.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mmpeft.data.packing import NO_CHOICES
from mmpeft.errors import RefusedError
from mmpeft.models.token_losses import TokenLosses, length_normalised

FLOOR = 1e-2


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
            if value < 0:
                raise RefusedError(f"choice_losses.{name} is {value}; it must be at least 0")

    @property
    def wanted(self) -> bool:
        """Whether wrong choices are looked at."""
        return self.unlikelihood > 0 or self.length_normalised > 0


def in_answers(losses: TokenLosses, right: Sequence[int]) -> Tensor:
    """(labelled,) bool: which tokens are of answers; the others are of wrong choices."""
    wanted = torch.tensor(right, device=losses.rows.device)[losses.rows]
    return (wanted == NO_CHOICES) | (losses.segments == wanted)


def language_modelling(losses: TokenLosses, right: Sequence[int]) -> Tensor:
    """L_LM: the mean over the tokens of all right answers."""
    return losses.nll[in_answers(losses, right)].mean()


def unlikelihood(losses: TokenLosses, right: Sequence[int]) -> Tensor:
    """L_UL: the mean of ``-log(1 - p + FLOOR)`` over the tokens of all wrong choices."""
    wrong = losses.nll[~in_answers(losses, right)]
    return -torch.log1p(FLOOR - torch.exp(-wrong)).mean()


def length_normalised_choice(losses: TokenLosses, right: Sequence[int]) -> Tensor:
    """L_LN: cross-entropy of the right choice among the mean log-probabilities of all, mean over questions."""
    rows = [row for row, segment in enumerate(right) if segment != NO_CHOICES]
    scores = length_normalised(losses, len(right))[rows]
    return F.cross_entropy(scores, torch.tensor([right[row] - 1 for row in rows], device=scores.device))


def objective(losses: TokenLosses, right: Sequence[int], weights: ChoiceLosses) -> dict[str, Tensor]:
    """The loss terms of one finetune's rows of a batch, each with its weight.

    Args:
        losses: of the tokens of those rows.
        right: per row of the whole batch, see `Batch`; rows of others must be `NO_CHOICES`.
        weights: of the terms.

    Returns:
        Name -> scalar; their sum is the loss. Rows without choices have "lm" alone.
    """
    terms = {"lm": language_modelling(losses, right)}
    if any(segment != NO_CHOICES for segment in right):
        if weights.unlikelihood:
            terms["unlikelihood"] = weights.unlikelihood * unlikelihood(losses, right)
        if weights.length_normalised:
            terms["length_normalised"] = weights.length_normalised * length_normalised_choice(losses, right)
    return terms


def exactly_right(losses: TokenLosses) -> dict[tuple[int, int], bool]:
    """Per conversation (row, segment), whether every labelled token was the most likely one.

    Greedy decoding would then have written exactly this answer, and any other otherwise: as long as it has
    written the answer's beginning, it stands where the labels stand.
    """
    conversations: dict[tuple[int, int], bool] = {}
    for row, segment, right in zip(
        losses.rows.tolist(), losses.segments.tolist(), losses.correct.tolist(), strict=True
    ):
        conversations[row, segment] = conversations.get((row, segment), True) and right
    return conversations

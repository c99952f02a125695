"""Preferences: DPO, IPO, ORPO, SimPO and KTO as loss functions of the log-probabilities of answers.

Sources: DPO Rafailov et al. 2023, equation 7, with label smoothing as in Mitchell 2023 (cDPO); IPO Azar et al. 2023,
equation 17, on means over tokens, as TRL has it by the authors' advice; ORPO Hong et al. 2024, equations 6 and 7;
SimPO Meng et al. 2024, equation 6; KTO Ethayarajh et al. 2024, equation 8. Names of settings are TRL's.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmpeft.data.batch import Conversations
from mmpeft.data.packing import Role
from mmpeft.data.preferred import Sides
from mmpeft.errors import RefusedError
from mmpeft.models.token_losses import TokenLosses
from mmpeft.training.objectives import Sum, keys_of, language_modelling
from mmpeft.transfer import to_device

Objective = Literal["likelihood", "dpo", "ipo", "orpo", "simpo", "kto"]
PAIRS, LABELS = "preference", "kto"
"""Terms that are means over pairs of a chosen and a rejected answer, and over labelled answers."""
MEASURES = ("chosen_reward", "rejected_reward", "reward_accuracy")
"""What is told of preferences beside the loss."""


class Kind(NamedTuple):
    """What an objective asks for."""

    settings: Mapping[str, float]
    """Its own, with their defaults."""
    term: str
    """The term that is its own."""
    has_reference: bool = False
    """Whether log-probabilities are those beyond a reference's."""
    per_token: bool = False
    """Whether they are means over an answer's tokens; else sums."""
    sides: Sides = "pairs"
    also_likely: bool = False
    """Whether the chosen answer's own likelihood is learnt beside."""

    @property
    def first_term(self) -> str:
        """Over whose count the losses of a step are summed."""
        return "lm" if self.also_likely else self.term


KINDS: dict[str, Kind] = {
    "likelihood": Kind({}, "lm", also_likely=True),
    "dpo": Kind({"beta": 0.1, "label_smoothing": 0.0}, PAIRS, has_reference=True),
    "ipo": Kind({"beta": 0.1}, PAIRS, has_reference=True, per_token=True),
    "orpo": Kind({"orpo_lambda": 0.1}, PAIRS, per_token=True, also_likely=True),
    "simpo": Kind({"beta": 2.0, "simpo_gamma": 1.0, "label_smoothing": 0.0}, PAIRS, per_token=True),
    "kto": Kind(
        {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
        LABELS,
        has_reference=True,
        sides="labels",
    ),
}
"""Objective -> what it asks for; "likelihood" is of answers, not of preferences among them."""


@dataclass
class PreferenceConfig:
    """Settings of the objectives that learn from preferences; null is the default of the objective."""

    beta: float | None = None
    """Of dpo, ipo, kto (0.1) and simpo (2): how much the log-probabilities count, for a large one the finetune stays
    nearer to its reference."""
    label_smoothing: float | None = None
    """Of dpo and simpo (0): share of pairs that are taken to be the wrong way round."""
    simpo_gamma: float | None = None
    """Of simpo (1): margin by which the chosen answer is to win."""
    orpo_lambda: float | None = None
    """Of orpo (0.1): weight of the odds beside the chosen answer's likelihood."""
    desirable_weight: float | None = None
    """Of kto (1): weight of good answers."""
    undesirable_weight: float | None = None
    """Of kto (1): weight of bad ones."""
    reference: str | None = None
    """Of dpo, ipo and kto: "base", or the adapter of model.start_from that the finetune begins as, as it was; null is
    what it begins from."""

    def __post_init__(self):
        for name, wanted, fits in (
            ("beta", "above 0", lambda value: value > 0),
            ("orpo_lambda", "above 0", lambda value: value > 0),
            ("label_smoothing", "of at least 0 and below 0.5", lambda value: 0 <= value < 0.5),
            ("simpo_gamma", "of at least 0", lambda value: value >= 0),
            ("desirable_weight", "of at least 0", lambda value: value >= 0),
            ("undesirable_weight", "of at least 0", lambda value: value >= 0),
        ):
            value = getattr(self, name)
            if value is not None and not (fits(value) and math.isfinite(value)):
                raise RefusedError(f"preferences.{name} is {value}; it must be a number {wanted}")

    @property
    def given(self) -> list[str]:
        """The settings that are."""
        return [name for name, value in vars(self).items() if value is not None]

    def of(self, objective: str) -> dict[str, float]:
        """The settings of an objective."""
        return {
            name: default if (own := getattr(self, name)) is None else own
            for name, default in KINDS[objective].settings.items()
        }

    def check(self, objective: str, where: str) -> None:
        """Raises:
        RefusedError: a setting that another objective has would be ignored.
        """
        kind = KINDS[objective]
        known = [*kind.settings, *(["reference"] if kind.has_reference else [])]
        if foreign := [name for name in self.given if name not in known]:
            raise RefusedError(
                f"{where}.preferences.{foreign[0]} is no setting of {objective}, which has {', '.join(known)}: take it "
                "out; in a joint run give each finetune its own preferences"
            )


def preference_terms(
    objective: str,
    config: PreferenceConfig,
    policy: TokenLosses,
    reference: TokenLosses | None,
    conversations: Conversations,
    point: Tensor | None,
) -> dict[str, Sum]:
    """What one finetune's rows of a batch give it to learn, and `MEASURES`.

    A question with several rejected answers is as many pairs, all with the same chosen one.

    Args:
        objective: one of `KINDS`.
        config: its settings.
        policy: losses of the tokens of those rows.
        reference: of the same tokens, where the objective has one.
        conversations: of those rows; choices that are right or wrong.
        point: scalar, KTO's reference point; None is 0.

    Returns:
        Term -> its sum, each to be the mean over its count.
    """
    kind, own = KINDS[objective], config.of(objective)
    scores = answer_scores(policy, conversations, kind.per_token)
    if kind.has_reference:
        assert reference is not None, f"{objective} has a reference"
        scores = scores - answer_scores(reference, conversations, kind.per_token)
    right = conversations.roles == Role.RIGHT
    if kind.sides == "labels":
        return _judged(scores, right, point, own)
    chosen, rejected = (
        scores.index_select(0, to_device(at, scores.device)) for at in pairs_of(conversations)
    )
    losses = pair_losses(objective, chosen, rejected, own)
    count, scale = len(losses), own.get("beta", own.get("orpo_lambda", 1.0))
    likely = {"lm": language_modelling(policy, None, conversations)} if kind.also_likely else {}
    return {
        **likely,
        PAIRS: Sum(losses.sum(), count),
        "chosen_reward": Sum(scale * chosen.detach().sum(), count),
        "rejected_reward": Sum(scale * rejected.detach().sum(), count),
        "reward_accuracy": Sum((chosen > rejected).float().sum(), count),
    }


def pair_losses(objective: str, chosen: Tensor, rejected: Tensor, own: Mapping[str, float]) -> Tensor:
    """(pairs,) losses.

    Args:
        objective: of pairs.
        chosen, rejected: (pairs,) log-probabilities of the answers, beyond the reference's where the objective has one;
            sums or means over tokens as `KINDS` says.
        own: the settings of the objective.
    """
    if objective == "ipo":
        return (chosen - rejected - 1 / (2 * own["beta"])) ** 2
    if objective == "orpo":
        return -own["orpo_lambda"] * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))
    margin, smoothing = (
        own["beta"] * (chosen - rejected) - own.get("simpo_gamma", 0.0),
        own["label_smoothing"],
    )
    return -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)


def label_losses(ratios: Tensor, good: Tensor, point: Tensor, own: Mapping[str, float]) -> Tensor:
    """(answers,) KTO's losses.

    Args:
        ratios: (answers,) log-probabilities beyond the reference's.
        good: (answers,) bool, the labels.
        point: scalar, the reference point: how far the policy is from its reference on mismatched answers, at least 0.
        own: the settings of "kto".
    """
    off = own["beta"] * (ratios - point)
    desirable = own["desirable_weight"] * (1 - torch.sigmoid(off))
    return torch.where(good, desirable, own["undesirable_weight"] * (1 - torch.sigmoid(-off)))


def answer_scores(losses: TokenLosses, conversations: Conversations, per_token: bool) -> Tensor:
    """(conversations,) log-probabilities of the answers, the end token among them: sums or means over their tokens.

    Args:
        losses: of the tokens of these conversations, in the same order.
        conversations: row by row.
        per_token: whether means are wanted.
    """
    places, device = np.searchsorted(keys_of(conversations), keys_of(losses)), losses.nll.device
    number = len(conversations.rows)
    sums = losses.nll.new_zeros(number).index_add(0, to_device(places, device), -losses.nll)
    if not per_token:
        return sums
    return sums / to_device(np.bincount(places, minlength=number), device).clamp(min=1)


def pairs_of(conversations: Conversations) -> tuple[np.ndarray, np.ndarray]:
    """(pairs,) int64 twice: the places of the chosen and of the rejected answer of each pair."""
    right = np.flatnonzero(conversations.roles == Role.RIGHT)
    wrong = np.flatnonzero(conversations.roles == Role.WRONG)
    return right[np.searchsorted(conversations.rows[right], conversations.rows[wrong])], wrong


def _judged(
    scores: Tensor, right: np.ndarray, point: Tensor | None, own: Mapping[str, float]
) -> dict[str, Sum]:
    point = scores.new_zeros(()) if point is None else point
    good = to_device(right, scores.device, torch.bool)
    losses, rewards = label_losses(scores, good, point, own), own["beta"] * scores.detach()
    named = {"chosen_reward": right, "rejected_reward": ~right}
    accurate = (rewards > own["beta"] * point) == good
    return {
        LABELS: Sum(losses.sum(), len(losses)),
        **{
            name: Sum(
                rewards.index_select(0, to_device(np.flatnonzero(own), rewards.device)).sum(), int(own.sum())
            )
            for name, own in named.items()
        },
        "reward_accuracy": Sum(accurate.float().sum(), len(losses)),
    }


def _log_odds(log_probabilities: Tensor) -> Tensor:
    """``log(p / (1 - p))``; of a certain answer that of the largest number below 1."""
    logs = log_probabilities.clamp(max=-torch.finfo(log_probabilities.dtype).eps)
    return logs - torch.log(-torch.expm1(logs))

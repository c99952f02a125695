"""DPO, IPO, ORPO, SimPO and KTO against the papers' formulas, written out, and against TRL where it is installed."""

import importlib
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mmpeft.data.batch import Conversations
from mmpeft.data.packing import Role
from mmpeft.models.token_losses import TokenLosses
from mmpeft.training.finetune import FinetuneConfig, Settings, make_finetunes
from mmpeft.training.objectives import ChoiceLosses
from mmpeft.training.preferences import KINDS, MEASURES, PreferenceConfig, label_losses, pair_losses
from mmpeft.training.preferences import preference_terms as sums_of

# row -> the log-probabilities of each answer's tokens under policy and reference, and which answer is chosen
ROWS = [
    ([[-0.1, -0.3], [-2.0, -0.5, -1.5]], [[-0.2, -0.1], [-1.0, -1.5, -0.5]], 0),
    ([[-4.0], [-0.01, -0.02]], [[-3.0], [-0.5, -0.02]], 1),
    ([[-1.0, -2.0], [-1.5, -1.0, -0.2], [-0.4]], [[-2.0, -2.0], [-0.5, -1.0, -0.9], [-0.3]], 1),
]
PAIR_WISE = ("dpo", "ipo", "orpo", "simpo")
POINT = 0.3


def table(rows=ROWS):
    entries = [
        (row, segment, Role.RIGHT if segment - 1 == right else Role.WRONG, row)
        for row, (answers, _, right) in enumerate(rows)
        for segment in range(1, len(answers) + 1)
    ]
    return Conversations(*np.array(entries).T)


def losses_of(which, rows=ROWS):
    places = [
        (row, segment, value)
        for row, own in enumerate(rows)
        for segment, values in enumerate(own[which], start=1)
        for value in values
    ]
    rows, segments, values = zip(*places, strict=True)
    nll = (-torch.tensor(values, dtype=torch.float64)).requires_grad_(which == 0)
    return TokenLosses(nll, torch.zeros(len(values), dtype=torch.bool), np.array(rows), np.array(segments))


def terms_of(objective, point=POINT, rows=ROWS, **settings):
    """Term -> its mean."""
    point = torch.tensor(point, dtype=torch.float64)
    config = PreferenceConfig(**settings)
    found = sums_of(objective, config, losses_of(0, rows), losses_of(1, rows), table(rows), point)
    return {name: float(own.mean.detach()) for name, own in found.items()}


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def pairs(per_token):
    """(log p of the chosen answer, of the rejected one), of policy and of reference, pair by pair."""

    def score(tokens):
        return sum(tokens) / (len(tokens) if per_token else 1)

    for policy, reference, right in ROWS:
        for wrong in range(len(policy)):
            if wrong != right:
                yield tuple(score(own[place]) for own in (policy, reference) for place in (right, wrong))


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def by_the_formulas(objective, beta=0.1, smoothing=0.0, gamma=1.0, weight=0.1, good=1.0, bad=1.0):
    if objective == "dpo":
        margins = [beta * ((c - rc) - (r - rr)) for c, r, rc, rr in pairs(False)]
        return mean(
            -(1 - smoothing) * math.log(sigmoid(m)) - smoothing * math.log(sigmoid(-m)) for m in margins
        )
    if objective == "ipo":
        return mean(((c - r) - (rc - rr) - 1 / (2 * beta)) ** 2 for c, r, rc, rr in pairs(True))
    if objective == "simpo":
        margins = [beta * (c - r) - gamma for c, r, *_ in pairs(True)]
        return mean(
            -(1 - smoothing) * math.log(sigmoid(m)) - smoothing * math.log(sigmoid(-m)) for m in margins
        )
    if objective == "orpo":

        def odds(log_p):
            return math.exp(log_p) / (1 - math.exp(log_p))

        return mean(-weight * math.log(sigmoid(math.log(odds(c) / odds(r)))) for c, r, *_ in pairs(True))
    found = []
    for policy, reference, right in ROWS:
        for place, (tokens, theirs) in enumerate(zip(policy, reference, strict=True)):
            ratio = sum(tokens) - sum(theirs)
            value = sigmoid(beta * (ratio - POINT)) if place == right else sigmoid(beta * (POINT - ratio))
            found.append((good if place == right else bad) * (1 - value))
    return mean(found)


@pytest.mark.parametrize(
    ("objective", "settings", "same"),
    [
        ("dpo", {}, {}),
        ("dpo", {"beta": 0.7, "label_smoothing": 0.2}, {"beta": 0.7, "smoothing": 0.2}),
        ("ipo", {}, {}),
        ("ipo", {"beta": 0.4}, {"beta": 0.4}),
        ("orpo", {}, {}),
        ("orpo", {"orpo_lambda": 0.5}, {"weight": 0.5}),
        ("simpo", {}, {"beta": 2.0, "gamma": 1.0}),
        (
            "simpo",
            {"beta": 1.5, "simpo_gamma": 0.4, "label_smoothing": 0.1},
            {"beta": 1.5, "gamma": 0.4, "smoothing": 0.1},
        ),
        ("kto", {}, {}),
        (
            "kto",
            {"beta": 0.5, "desirable_weight": 0.7, "undesirable_weight": 1.3},
            {"beta": 0.5, "good": 0.7, "bad": 1.3},
        ),
    ],
)
def test_each_objective_is_its_formula(objective, settings, same):
    found = terms_of(objective, **settings)
    assert found[KINDS[objective].term] == pytest.approx(by_the_formulas(objective, **same), rel=1e-9)


def test_orpo_learns_the_chosen_answers_too():
    tokens = [value for policy, _, right in ROWS for value in policy[right]]
    found = terms_of("orpo")
    assert found.keys() == {"lm", "preference", *MEASURES}
    assert found["lm"] == pytest.approx(-mean(tokens), rel=1e-9)
    assert terms_of("simpo").keys() == {"preference", *MEASURES}


def test_rewards_are_those_of_pairs_and_of_labels():
    """Of dpo: beta times the log-ratio; the second row's chosen answer is the first one's loser."""
    found, own = terms_of("dpo", beta=0.5), list(pairs(False))
    assert found["chosen_reward"] == pytest.approx(mean(0.5 * (c - rc) for c, _, rc, _ in own))
    assert found["rejected_reward"] == pytest.approx(mean(0.5 * (r - rr) for _, r, _, rr in own))
    assert found["reward_accuracy"] == mean(c - rc > r - rr for c, r, rc, rr in own)
    assert 0 < found["reward_accuracy"] < 1
    judged = terms_of("kto", beta=0.5)
    ratios = [
        (0.5 * (sum(a) - sum(b)), place == right)
        for policy, reference, right in ROWS
        for place, (a, b) in enumerate(zip(policy, reference, strict=True))
    ]
    assert judged["chosen_reward"] == pytest.approx(mean(value for value, good in ratios if good))
    assert judged["rejected_reward"] == pytest.approx(mean(value for value, good in ratios if not good))
    right = mean((value > 0.5 * POINT) == good for value, good in ratios)
    assert judged["reward_accuracy"] == pytest.approx(right)


@pytest.mark.parametrize("objective", [*PAIR_WISE, "kto"])
def test_gradients_are_right(objective):
    policy, reference, point = losses_of(0), losses_of(1), torch.tensor(POINT, dtype=torch.float64)

    def total(nll):
        own = TokenLosses(nll, policy.correct, policy.rows, policy.segments)
        found = sums_of(objective, PreferenceConfig(), own, reference, table(), point)
        return sum(each.mean for name, each in found.items() if name not in MEASURES)

    assert torch.autograd.gradcheck(total, (policy.nll,))


def test_an_answer_that_is_certain_has_finite_odds():
    own = PreferenceConfig().of("orpo")
    chosen = torch.tensor([0.0, -1.0], requires_grad=True)
    loss = pair_losses("orpo", chosen, torch.tensor([-1.0, 0.0]), own).sum()
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(chosen.grad).all()


def test_rows_apart_add_up_to_rows_together():
    """Pieces of a batch, and processes."""
    for objective in (*PAIR_WISE, "kto"):
        point = torch.tensor(POINT, dtype=torch.float64)
        whole = sums_of(objective, PreferenceConfig(), losses_of(0), losses_of(1), table(), point)
        parts = [
            sums_of(objective, PreferenceConfig(), losses_of(0, own), losses_of(1, own), table(own), point)
            for own in (ROWS[:1], ROWS[1:])
        ]
        for name, each in whole.items():
            assert each.count == sum(part[name].count for part in parts)
            torch.testing.assert_close(each.total, sum(part[name].total for part in parts))


@pytest.fixture
def trl(monkeypatch):
    """Beside transformers 5 it takes for installed what is not."""
    from trl import import_utils

    for name, value in list(vars(import_utils).items()):
        if name.endswith("_available") and isinstance(value, tuple):
            monkeypatch.setattr(import_utils, name, value[0])
    return importlib.import_module("trl")


@pytest.mark.parametrize("objective", [*PAIR_WISE, "kto"])
def test_losses_are_those_of_trl(objective, trl):
    """The same log-probabilities; its trainers' functions are called on settings alone."""
    settings = {
        "dpo": {"beta": 0.3, "label_smoothing": 0.1},
        "ipo": {"beta": 0.3},
        "orpo": {"orpo_lambda": 0.3},
        "simpo": {"beta": 2.5, "simpo_gamma": 0.7, "label_smoothing": 0.1},
        "kto": {"beta": 0.3, "desirable_weight": 0.8, "undesirable_weight": 1.2},
    }[objective]
    own = PreferenceConfig(**settings).of(objective)
    generator = torch.Generator().manual_seed(0)
    chosen, rejected, theirs, their_rejected, other, their_other = (
        -3 * torch.rand(50, generator=generator, dtype=torch.float64) - 0.01 for _ in range(6)
    )
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda tensor: tensor),
        **{
            "beta": own.get("beta", own.get("orpo_lambda")),
            "label_smoothing": own.get("label_smoothing", 0.0),
        },
        **{"reference_free": False, "f_divergence_type": "reverse_kl", "f_divergence_params": {}},
        **{"loss_type": {"dpo": "sigmoid"}.get(objective, objective), "alpha": 0.0, "calculate_KL": True},
        **{name: own.get(name) for name in ("simpo_gamma", "desirable_weight", "undesirable_weight")},
    )
    if objective in ("dpo", "ipo"):
        references = theirs, their_rejected
        want, *_ = trl.DPOTrainer.dpo_loss(trainer, chosen, rejected, *references, trainer.loss_type)
        got = pair_losses(objective, chosen - theirs, rejected - their_rejected, own)
    elif objective == "orpo":
        ratios, *_ = trl.ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)
        want, got = -ratios, pair_losses(objective, chosen, rejected, own)
    elif objective == "simpo":
        want, *_ = trl.CPOTrainer.cpo_loss(trainer, chosen, rejected)
        got = pair_losses(objective, chosen, rejected, own)
    else:
        given = chosen, rejected, other, theirs, their_rejected, their_other
        want, *_ = trl.KTOTrainer.kto_loss(trainer, *given)
        good = torch.arange(100) < 50
        point = (other - their_other).mean().clamp(min=0)
        got = label_losses(torch.cat([chosen - theirs, rejected - their_rejected]), good, point, own)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0}, r"preferences\.beta is 0; it must be a number above 0"),
        ({"beta": math.nan}, r"preferences\.beta is nan"),
        (
            {"label_smoothing": 0.5},
            r"label_smoothing is 0\.5; it must be a number of at least 0 and below 0\.5",
        ),
        ({"undesirable_weight": -1}, r"undesirable_weight is -1; it must be a number of at least 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PreferenceConfig(**settings)


@pytest.mark.parametrize(
    ("objective", "given", "message"),
    [
        (
            "dpo",
            {"simpo_gamma": 1.0},
            r"model\.preferences\.simpo_gamma is no setting of dpo, which has beta, label_",
        ),
        ("orpo", {"beta": 1.0}, r"preferences\.beta is no setting of orpo, which has orpo_lambda"),
        ("simpo", {"reference": "base"}, r"preferences\.reference is no setting of simpo"),
    ],
)
def test_a_setting_of_another_objective_is_refused(objective, given, message):
    with pytest.raises(ValueError, match=message):
        Settings(objective=objective, preferences=PreferenceConfig(**given))


def test_preferences_that_nothing_learns_from_are_refused():
    given = Settings(preferences=PreferenceConfig(beta=0.2))
    with pytest.raises(
        ValueError, match=r"model\.preferences\.beta is given, but nothing learns from prefer"
    ):
        make_finetunes(None, "default", None, given)
    own = FinetuneConfig(None, preferences=PreferenceConfig(beta=0.2))
    with pytest.raises(
        ValueError, match=r"model\.adapters\.a\.preferences are given, but its objective is likel"
    ):
        make_finetunes(None, "default", {"a": own}, Settings())
    found = make_finetunes(
        None, "default", {"a": FinetuneConfig(None, objective="dpo"), "b": FinetuneConfig(None)}, given
    )
    assert [own.settings.objective for own in found.values()] == ["dpo", "likelihood"]
    assert found["a"].settings.preferences.beta == 0.2


def test_the_losses_of_tfew_beside_a_preference_are_refused():
    with pytest.raises(ValueError, match=r"model\.choice_losses are T-Few's, and model\.objective is dpo"):
        Settings(objective="dpo", choice_losses=ChoiceLosses(unlikelihood=0.5))
    Settings(objective="dpo", choice_losses=ChoiceLosses(0, 0))

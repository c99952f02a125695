"""T-Few's three losses against the formulas, choice by choice and token by token."""

import math

import numpy as np
import pytest
import torch

from mmpeft.data.batch import Conversations
from mmpeft.data.packing import Role
from mmpeft.models.token_losses import TokenLosses, length_normalised
from mmpeft.training.objectives import FLOOR, ChoiceLosses
from mmpeft.training.objectives import objective as sums_of

# row -> the log-probabilities of each conversation's tokens, and which conversation is right
ROWS = [
    ([[-0.1, -0.3], [-2.0, -0.5, -1.5], [-3.0]], 1),
    ([[-4.0], [-0.01, -0.02]], 2),
    ([[-0.7, -0.9], [-1.1]], None),
    ([[-1.0, -2.0], [-1.5, -1.0, -0.2, -0.1], [-0.4], [-5.0, -6.0]], 3),
]


def table(rights):
    """The conversations of `ROWS`; ``rights`` says which segment of a row is right, None that its rows are answers."""
    entries = [
        (row, segment, Role.ANSWER if right is None else Role.RIGHT if segment == right else Role.WRONG, row)
        for row, ((conversations, _), right) in enumerate(zip(ROWS, rights, strict=True))
        for segment in range(1, len(conversations) + 1)
    ]
    return Conversations(*np.array(entries).T)


def objective(*arguments):
    """Term -> its mean."""
    return {term: own.mean for term, own in sums_of(*arguments).items()}


RIGHT = table([right for _, right in ROWS])


@pytest.fixture
def losses():
    places = [
        (row, segment, value)
        for row, (conversations, _) in enumerate(ROWS)
        for segment, values in enumerate(conversations, start=1)
        for value in values
    ]
    rows, segments, values = zip(*places, strict=True)
    nll = (-torch.tensor(values, dtype=torch.float64)).requires_grad_()
    return TokenLosses(nll, torch.zeros(len(values), dtype=torch.bool), np.array(rows), np.array(segments))


def by_the_formulas() -> dict[str, float]:
    right_tokens, wrong, choice = [], [], []
    for conversations, right in ROWS:
        if right is None:
            right_tokens += [token for conversation in conversations for token in conversation]
            continue
        right_tokens += conversations[right - 1]
        wrong += [
            t for n, conversation in enumerate(conversations, start=1) if n != right for t in conversation
        ]
        beta = [sum(conversation) / len(conversation) for conversation in conversations]
        choice.append(-math.log(math.exp(beta[right - 1]) / sum(math.exp(b) for b in beta)))
    return {
        "lm": -sum(right_tokens) / len(right_tokens),
        "unlikelihood": -sum(math.log(1 - math.exp(token) + FLOOR) for token in wrong) / len(wrong),
        "length_normalised": sum(choice) / len(choice),
    }


def test_each_term_is_its_formula(losses):
    terms = objective(losses, None, RIGHT, ChoiceLosses())
    want = by_the_formulas()
    assert terms.keys() == want.keys()
    for name, value in want.items():
        assert float(terms[name].detach()) == pytest.approx(value, rel=1e-9), name


def test_weights_scale_their_terms_and_zero_leaves_them_out(losses):
    plain = objective(losses, None, RIGHT, ChoiceLosses())
    weighted = objective(losses, None, RIGHT, ChoiceLosses(unlikelihood=0.5, length_normalised=0))
    assert weighted.keys() == {"lm", "unlikelihood"}
    assert float(weighted["unlikelihood"].detach()) == pytest.approx(
        0.5 * float(plain["unlikelihood"].detach()), rel=1e-9
    )


def test_rows_without_choices_have_the_mean_of_their_tokens_alone(losses):
    terms = objective(losses, None, table([None] * len(ROWS)), ChoiceLosses())
    assert terms.keys() == {"lm"}
    assert float(terms["lm"].detach()) == pytest.approx(float(losses.nll.detach().mean()))


def test_gradients_are_right_and_finite_with_any_number_of_choices(losses):
    def total(nll):
        own = TokenLosses(nll, losses.correct, losses.rows, losses.segments)
        return torch.stack(list(objective(own, None, RIGHT, ChoiceLosses()).values())).sum()

    assert torch.autograd.gradcheck(total, (losses.nll,))


def test_a_wrong_answer_that_is_certain_has_a_finite_gradient():
    nll = torch.tensor([0.5, 0.0], requires_grad=True)
    losses = TokenLosses(nll, torch.zeros(2, dtype=torch.bool), np.array([0, 0]), np.array([1, 2]))
    two = Conversations(*np.array([(0, 1, Role.RIGHT, 0), (0, 2, Role.WRONG, 0)]).T)
    torch.stack(list(objective(losses, None, two, ChoiceLosses()).values())).sum().backward()
    assert torch.isfinite(nll.grad).all()


def test_scores_of_conversations_that_a_row_lacks_are_minus_infinity(losses):
    scores = length_normalised(losses, len(ROWS))
    assert scores.shape == (4, 4)
    assert torch.isinf(scores[1, 2:]).all()
    assert float(scores[3, 1].detach()) == pytest.approx((-1.5 - 1.0 - 0.2 - 0.1) / 4)


def test_a_negative_weight_is_refused():
    with pytest.raises(ValueError, match="unlikelihood is -1"):
        ChoiceLosses(unlikelihood=-1)

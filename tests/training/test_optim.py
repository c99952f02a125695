"""Gradients scaled, clipped and guarded per finetune, and the learning rate's course."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from mmpeft.training.optim import Finetune, warmup_then


@pytest.fixture
def stacks():
    """Two Parameters of two slots with gradients: slot 0's norm is 5, slot 1's is 50."""
    first, second = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 1, 2))
    first.grad = torch.tensor([[3.0, 0.0], [30.0, 0.0]])
    second.grad = torch.tensor([[[0.0, 4.0]], [[0.0, 40.0]]])
    return first, second


def finetune(stacks, slot):
    return Finetune(f"number {slot}", [(parameter, slot) for parameter in stacks])


def test_each_finetune_is_clipped_by_its_own_norm(stacks):
    before = [parameter.grad.clone() for parameter in stacks]
    small, large = finetune(stacks, 0), finetune(stacks, 1)
    assert small.clip(10.0) == pytest.approx(5)
    assert large.clip(10.0) == pytest.approx(50), "the norm before clipping"
    for parameter, old in zip(stacks, before, strict=True):
        assert torch.equal(parameter.grad[0], old[0])
        torch.testing.assert_close(parameter.grad[1], old[1] / 5)
    assert large.norm() == pytest.approx(10)


def test_clipping_equals_torchs_own_on_a_single_finetune(stacks):
    copies = [nn.Parameter(parameter.detach()[1].clone()) for parameter in stacks]
    for copy, parameter in zip(copies, stacks, strict=True):
        copy.grad = parameter.grad[1].clone()
    norm = nn.utils.clip_grad_norm_(copies, 7.0)
    assert finetune(stacks, 1).clip(7.0) == pytest.approx(float(norm))
    for copy, parameter in zip(copies, stacks, strict=True):
        torch.testing.assert_close(parameter.grad[1], copy.grad)


def test_without_a_limit_nothing_is_clipped(stacks):
    before = stacks[0].grad.clone()
    assert finetune(stacks, 1).clip(None) == pytest.approx(50)
    assert torch.equal(stacks[0].grad, before)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_not_scaled_into_others(stacks, value):
    stacks[0].grad[1, 0] = value
    before = stacks[0].grad[0].clone()
    assert not math.isfinite(finetune(stacks, 1).clip(1.0))
    assert finetune(stacks, 0).clip(10.0) == pytest.approx(5)
    assert torch.equal(stacks[0].grad[0], before)


def test_a_finetune_without_gradients_has_norm_zero():
    assert Finetune("idle", [(nn.Parameter(torch.ones(1, 2)), 0)]).clip(1.0) == 0.0


@pytest.mark.parametrize("steps_before", [0, 3])
def test_a_held_finetune_keeps_every_bit_while_the_other_steps(stacks, steps_before):
    optimizer = torch.optim.AdamW(stacks, lr=0.1, weight_decay=0.1)
    for _ in range(steps_before):
        optimizer.step()
    expected = [nn.Parameter(parameter.detach().clone()) for parameter in stacks]
    alone = torch.optim.AdamW(expected, lr=0.1, weight_decay=0.1)
    alone.load_state_dict(optimizer.state_dict())
    for copy, parameter in zip(expected, stacks, strict=True):
        copy.grad = parameter.grad.clone()
    alone.step()

    before = [parameter.detach()[0].clone() for parameter in stacks]
    moments = [{k: v[0].clone() for k, v in optimizer.state[p].items() if v.dim()} for p in stacks]
    stacks[0].grad[0, 0] = math.nan
    restore = finetune(stacks, 0).hold(optimizer)
    optimizer.step()
    restore()
    for number, parameter in enumerate(stacks):
        assert torch.equal(parameter[0], before[number])
        assert torch.equal(parameter[1], expected[number][1])
        for key, value in optimizer.state[parameter].items():
            if value.dim():
                assert torch.equal(value[0], moments[number].get(key, torch.zeros_like(value[0]))), key


@pytest.mark.parametrize(
    ("schedule", "last"),
    [("constant", 1.0), ("linear", 1 / 90), ("cosine", (1 + math.cos(math.pi * 89 / 90)) / 2)],
)
def test_learning_rate_rises_then_decays(schedule, last):
    factor = warmup_then(schedule, 0.1, 100)
    factors = [factor(step) for step in range(100)]
    assert factors[:10] == pytest.approx([n / 10 for n in range(1, 11)])
    assert factors[10] == 1.0
    assert all(one >= two for one, two in pairwise(factors[10:]))
    assert factors[99] == pytest.approx(last)
    assert factor(1000) == pytest.approx(1.0 if schedule == "constant" else 0.0)


def test_without_warmup_the_first_step_is_a_whole_one():
    assert warmup_then("cosine", 0.0, 10)(0) == 1.0

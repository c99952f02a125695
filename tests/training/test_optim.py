"""Gradients scaled, clipped and guarded per finetune, and the learning rate's course."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from transformers.optimization import Adafactor

from mmpeft.adapters import LoraConfig
from mmpeft.adapters.methods.lora import LoraStack
from mmpeft.training.optim import PATIENCE, Slice, SlotParameters, TFewAdafactor, warmup_then


@pytest.fixture
def stacks():
    """Two Parameters of two slots with gradients: slot 0's norm is 5, slot 1's is 50."""
    first, second = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 1, 2))
    first.grad = torch.tensor([[3.0, 0.0], [30.0, 0.0]])
    second.grad = torch.tensor([[[0.0, 4.0]], [[0.0, 40.0]]])
    return first, second


def finetune(stacks, slot):
    first, second = stacks
    return SlotParameters(f"number {slot}", [Slice(first, slot)], [Slice(second, slot)])


def step(finetunes, optimizer, tokens=1, max_norm=None):
    norms = []
    for each in finetunes:
        each.take_gradients(tokens)
        norms.append(each.clip(max_norm))
    optimizer.step()
    return norms


def test_the_views_are_the_stacks_own_memory(stacks):
    own = finetune(stacks, 1)
    step([own], torch.optim.SGD(own.views, lr=0.1))
    assert torch.equal(stacks[0], torch.tensor([[1.0, 1.0], [-2.0, 1.0]]))
    assert torch.equal(stacks[1], torch.tensor([[[1.0, 1.0]], [[1.0, -3.0]]]))
    assert ([p.shape for p in own.adapter], [p.shape for p in own.projector]) == ([(2,)], [(1, 2)])


def test_each_finetune_is_clipped_by_its_own_norm(stacks):
    small, large = finetune(stacks, 0), finetune(stacks, 1)
    for each, norm in ((small, 5), (large, 50)):
        each.take_gradients(1)
        assert each.clip(10.0) == pytest.approx(norm), "the norm before clipping"
    assert small.adapter[0].grad.tolist() == [3, 0]
    torch.testing.assert_close(large.adapter[0].grad, torch.tensor([6.0, 0.0]))
    torch.testing.assert_close(large.projector[0].grad, torch.tensor([[0.0, 8.0]]))


def test_clipping_equals_torchs_own_on_a_single_finetune(stacks):
    copies = [nn.Parameter(parameter.detach()[1].clone()) for parameter in stacks]
    for copy, parameter in zip(copies, stacks, strict=True):
        copy.grad = parameter.grad[1].clone()
    norm = nn.utils.clip_grad_norm_(copies, 7.0)
    own = finetune(stacks, 1)
    own.take_gradients(1)
    assert own.clip(7.0) == pytest.approx(float(norm))
    for copy, view in zip(copies, own.views, strict=True):
        torch.testing.assert_close(view.grad, copy.grad)


def test_without_a_limit_nothing_is_clipped(stacks):
    own = finetune(stacks, 1)
    own.take_gradients(1)
    assert own.clip(None) == pytest.approx(50)
    assert own.adapter[0].grad.tolist() == [30, 0]


def test_the_gradient_of_a_sum_becomes_that_of_the_mean(stacks):
    own = finetune(stacks, 1)
    own.take_gradients(2.5)
    torch.testing.assert_close(own.adapter[0].grad, torch.tensor([12.0, 0.0]))
    assert stacks[0].grad[0].tolist() == [3, 0], "the other finetune's is its own affair"


def test_a_finetune_without_tokens_or_gradients_sits_the_step_out(stacks):
    own = finetune(stacks, 0)
    before = own.adapter[0].clone()
    assert step([own], torch.optim.AdamW(own.views, lr=0.1), tokens=0) == [None]
    stacks[0].grad = stacks[1].grad = None
    assert step([own], torch.optim.AdamW(own.views, lr=0.1)) == [None]
    assert own.steps == 0
    assert torch.equal(own.adapter[0], before)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("steps_before", [0, 3])
def test_a_finetune_without_finite_gradient_keeps_every_bit_while_the_other_steps(
    stacks, steps_before, value
):
    finetunes = [finetune(stacks, 0), finetune(stacks, 1)]
    optimizer = torch.optim.AdamW([{"params": f.views} for f in finetunes], lr=0.1, weight_decay=0.1)
    alone = [nn.Parameter(parameter.detach()[1].clone()) for parameter in stacks]
    reference = torch.optim.AdamW(alone, lr=0.1, weight_decay=0.1)
    for _ in range(steps_before + 1):
        for copy, parameter in zip(alone, stacks, strict=True):
            copy.grad = parameter.grad[1].clone()
        reference.step()
    for _ in range(steps_before):
        step(finetunes, optimizer)
    before = [view.detach().clone() for view in finetunes[0].views]
    moments = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in finetunes[0].views]
    stacks[0].grad[0, 0] = value
    step(finetunes, optimizer)
    assert [f.steps for f in finetunes] == [steps_before, steps_before + 1]
    assert [f.skipped for f in finetunes] == [1, 0]
    for view, old, moment in zip(finetunes[0].views, before, moments, strict=True):
        assert torch.equal(view, old)
        assert all(torch.equal(optimizer.state[view][key], moment[key]) for key in moment)
    for copy, view in zip(alone, finetunes[1].views, strict=True):
        assert torch.equal(view, copy)


def test_a_finetune_that_stays_without_finite_gradient_is_given_up(stacks):
    own = finetune(stacks, 0)
    optimizer = torch.optim.AdamW(own.views, lr=0.1)
    stacks[0].grad[0, 0] = math.nan
    for _ in range(PATIENCE - 1):
        step([own], optimizer)
    assert not own.given_up
    again = finetune(stacks, 0)
    again.load_state_dict(own.state_dict())
    step([again], optimizer)
    assert (again.given_up, again.skipped) == (True, PATIENCE)
    stacks[0].grad[0, 0] = 1.0
    assert step([again], optimizer) == [None], "for good"


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


def test_adafactor_on_deltas_is_hugging_faces_on_the_vectors_themselves():
    """T-Few's optimiser, on IA3's l = 1 + delta and on a projector's matrix, over steps with small and zero
    gradients and with gradients large enough to be clipped."""
    generator = torch.Generator().manual_seed(0)
    delta, matrix = nn.Parameter(torch.zeros(2, 8)), nn.Parameter(torch.randn(1, 6, 4, generator=generator))
    own = SlotParameters("t", [Slice(delta, 1, origin=1.0)], [Slice(matrix, 0)])
    vector, theirs = nn.Parameter(torch.ones(8)), nn.Parameter(matrix.detach()[0].clone())
    optimizer = TFewAdafactor(own.groups(3e-3, 3e-3, 0.0), 30)
    reference = Adafactor(
        [vector, theirs], lr=3e-3, scale_parameter=True, relative_step=False, warmup_init=False
    )
    for number in range(30):
        delta.grad = torch.randn(2, 8, generator=generator) * 10.0 ** (number % 5 - 8)
        delta.grad[1, 3] = 0
        matrix.grad = torch.randn(1, 6, 4, generator=generator)
        vector.grad, theirs.grad = delta.grad[1].clone(), matrix.grad[0].clone()
        own.take_gradients(1)
        optimizer.step()
        reference.step()
        torch.testing.assert_close(delta.detach()[1] + 1, vector.detach(), rtol=0, atol=2e-6)
        torch.testing.assert_close(matrix.detach()[0], theirs.detach(), rtol=1e-5, atol=1e-6)
    assert (vector - 1).abs().max() > 0.01, "it moved by far more than what is allowed to differ"
    assert torch.equal(delta.detach()[0], torch.zeros(8)), "the other finetune's slot stays"


def test_adafactor_leaves_the_bits_of_a_finetune_that_sits_out():
    deltas = nn.Parameter(torch.randn(1, 8, generator=torch.Generator().manual_seed(0)) * 1e-3)
    before = deltas.detach().clone()
    own = SlotParameters("t", [Slice(deltas, 0, origin=1.0)])
    optimizer = TFewAdafactor(own.groups(3e-3, 3e-3, 0.0), 30)
    own.take_gradients(0)
    optimizer.step()
    assert torch.equal(deltas.detach(), before)


def test_adafactors_weight_decay_pulls_towards_the_base():
    deltas = nn.Parameter(torch.full((1, 8), 0.5))
    own = SlotParameters("t", [Slice(deltas, 0, origin=1.0)])
    optimizer = TFewAdafactor(own.groups(1e-2, 1e-2, 0.5), 100)
    for _ in range(100):
        deltas.grad = torch.zeros(1, 8)
        own.take_gradients(1)
        optimizer.step()
    torch.testing.assert_close(
        deltas.detach(), torch.full((1, 8), 0.5 * (1 - 1e-2 * 0.5) ** 100), rtol=1e-4, atol=0
    )


def test_adafactor_takes_the_steps_of_the_finetunes_own_size():
    """Beside a larger one its slot is padded with zeros, which would make its root mean square smaller."""
    generator = torch.Generator().manual_seed(0)
    start, gradients = torch.randn(4, 6, generator=generator), torch.randn(20, 4, 6, generator=generator)
    moved = []
    for rank in (4, 16):
        stack = LoraStack(6, 5, num_slots=2, rank=rank)
        stack.open(1, LoraConfig(rank=4), generator)
        stack.lora_A.data[1, :4] = start
        parts = [Slice(p, 1, 0.0, stack.own_dims(name, 1)) for name, p in stack.named_parameters()]
        own = SlotParameters("t", parts)
        assert [tuple(view.shape) for view in own.views] == [(4, 6), (5, 4)]
        optimizer = TFewAdafactor(own.groups(1e-2, 1e-2, 0.0), 20)
        for gradient in gradients:
            stack.lora_A.grad = torch.zeros_like(stack.lora_A)
            stack.lora_A.grad[1, :4] = gradient
            own.take_gradients(1)
            optimizer.step()
        moved.append(stack.lora_A.detach()[1, :4].clone())
    assert torch.equal(*moved)
    assert not torch.equal(moved[0], start)


def test_a_rate_that_adafactor_would_lower_is_refused():
    own = SlotParameters("t", [Slice(nn.Parameter(torch.ones(1, 8)), 0)])
    with pytest.raises(
        ValueError, match=r"learning rate 0.3 of t adapter to 1 / sqrt\(step\), 0.1 after 100"
    ):
        TFewAdafactor(own.groups(0.3, 0.1, 0.0), 100)


def test_what_sees_images_rests_in_a_step_without_any():
    """Others' images leave zeros in its gradient, on which momentum and weight decay would go on."""
    adapter, projector = nn.Parameter(torch.ones(1, 2)), nn.Parameter(torch.ones(1, 2))
    own = SlotParameters("t", [Slice(adapter, 0)], [Slice(projector, 0, of_images=True)])
    optimizer = torch.optim.AdamW(own.groups(1e-1, 1e-1, 0.1))
    for images in (True, False):
        before = adapter.detach().clone(), projector.detach().clone()
        adapter.grad, projector.grad = torch.ones(1, 2), torch.zeros(1, 2) if not images else torch.ones(1, 2)
        own.take_gradients(1, images)
        optimizer.step()
        assert not torch.equal(adapter.detach(), before[0])
        assert torch.equal(projector.detach(), before[1]) == (not images)

"""The pure maths, against the formula written out row by row in float64."""

import pytest
import torch

from mmpeft.adapters.functional import ALL_SERVED, BASE, add_lora_of_one, gather_slots, ia3_scale, lora_delta

SLOTS, ROWS, TOKENS, IN, OUT, RANK = 3, 5, 4, 16, 12, 6


@pytest.fixture
def lora_stack():
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(SLOTS, RANK, IN, generator=generator)
    B = torch.randn(SLOTS, OUT, RANK, generator=generator)
    x = torch.randn(ROWS, TOKENS, IN, generator=generator)
    return x, A, B, torch.tensor([0.3, 2.0, 1 / 3])


def test_gather_gives_each_row_its_slot_and_base_rows_zero():
    stack = torch.tensor([[torch.nan, torch.nan], [1.0, 2.0], [3.0, 4.0]])
    rows = gather_slots(stack, torch.tensor([2, BASE, 1]))
    assert rows.tolist() == [[3.0, 4.0], [0.0, 0.0], [1.0, 2.0]]


def test_base_rows_send_no_gradient_to_any_slot():
    """A base row is clamped to slot 0 to be gathered; slot 0 must not notice."""
    stack = torch.ones(2, 3, requires_grad=True)
    (gather_slots(stack, torch.tensor([BASE, 1])) * torch.tensor([[torch.nan], [2.0]])).sum().backward()
    assert stack.grad.tolist() == [[0.0] * 3, [2.0] * 3]


def test_lora_delta_is_the_formula_row_by_row(lora_stack):
    x, A, B, scaling = lora_stack
    slots = torch.tensor([1, BASE, 0, 2, 1])
    got = lora_delta(x, A, B, scaling, slots)
    for row, slot in enumerate(slots.tolist()):
        if slot == BASE:
            assert torch.equal(got[row], torch.zeros(TOKENS, OUT))
        else:
            want = scaling[slot].double() * x[row].double() @ A[slot].double().T @ B[slot].double().T
            torch.testing.assert_close(got[row].double(), want, rtol=1e-5, atol=1e-5)


def test_one_slot_for_all_rows_equals_the_gathered_path(lora_stack):
    """The short cut for a single finetune may round differently (another product kernel), no more; forward and
    backward, also where the frozen linear returned a view."""
    x, A, B, scaling = lora_stack
    given = torch.randn(ROWS, TOKENS, 2 * OUT)
    for y in (
        given[..., :OUT].clone(),
        given[..., :OUT],
        given.clone()[..., :OUT].reshape(-1).view(ROWS, TOKENS, OUT),
    ):
        leaves = [t.clone().requires_grad_() for t in (y, x, A[1:2], B[1:2])]
        gathered = leaves[0] + lora_delta(
            leaves[1], *leaves[2:], scaling[1:2], torch.zeros(ROWS, dtype=torch.int64)
        )
        frozen = leaves[0] * 1 if not y._is_view() else (leaves[0] * 1).view(y.shape)
        direct = add_lora_of_one(frozen, *leaves[1:], scaling[1:2])
        torch.testing.assert_close(direct, gathered, rtol=1e-5, atol=1e-5)
        weights = torch.randn(gathered.shape)
        want = torch.autograd.grad((gathered * weights).sum(), leaves)
        got = torch.autograd.grad((direct * weights).sum(), leaves)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_zero_delta_scales_to_the_same_bits():
    x = torch.cat([torch.randn(100), torch.tensor([0.0, -0.0, 3e38, 1e-45])]).view(1, 1, -1)
    for dtype in (torch.float32, torch.bfloat16):
        typed = x.to(dtype)
        assert torch.equal(ia3_scale(typed, torch.zeros(x.shape[-1])), typed)


def test_a_delta_below_bf16_resolution_still_acts():
    """``1 + 2**-9`` rounds to 1 in bf16; the fused form gives the correctly rounded ``x * (1 + delta)``."""
    x = torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    delta = torch.full((64,), 2.0**-9 * 1.5)
    scaled = ia3_scale(x, delta)
    assert torch.equal(scaled, (x.double() * (1 + delta.double())).bfloat16())
    assert not torch.equal(scaled, x)


@pytest.mark.parametrize("rows", [[0, 2, 1, 0], [1, 1, 1, 1]])
def test_rows_that_are_all_served_are_gathered_the_same_without_looking_for_base_rows(rows):
    stack = torch.randn(3, 4, 5, requires_grad=True)
    found = []
    for served in (True, False):
        slots = torch.tensor(rows)
        setattr(slots, ALL_SERVED, served)
        gathered = gather_slots(stack, slots)
        (gradient,) = torch.autograd.grad(gathered.square().sum(), stack)
        found.append((gathered, gradient))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_only_a_batch_without_base_rows_is_routed_as_all_served(make_bank):
    bank = make_bank()
    for names, served in ((["small", "large"], True), (["small", None], False), (["small", "tfew"], False)):
        bank.route(names)
        assert getattr(bank.routing.slots["lora"], ALL_SERVED) is served

"""Counted operations are those of the formulas."""

import pytest
import torch
from torch import nn

from mmpeft.adapters import AdapterConfig, IA3Config, LoraConfig
from mmpeft.experiments.flops import Operations, count_operations

LENGTH = 48


def count_forward(model, ids) -> Operations:
    with torch.inference_mode():
        return count_operations(lambda: model(ids, use_cache=False))


def test_a_dense_forward_takes_two_per_parameter_and_token_and_attention(make_llama, tokens):
    model = make_llama(attn_implementation="eager")
    config, embeddings = model.config, model.get_input_embeddings().weight.numel()
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2) - embeddings
    products = 2 * matrices * LENGTH
    attention = (
        config.num_hidden_layers * 2 * 2 * LENGTH**2 * config.hidden_size
    )  # q k^T, then weights times v
    counted = count_forward(model, tokens(1, LENGTH)).products
    assert counted == pytest.approx(products + attention, rel=0.02)
    assert counted != pytest.approx(products, rel=0.02)


@pytest.mark.parametrize("config", [LoraConfig(rank=4), IA3Config()], ids=["lora", "ia3"])
def test_what_an_adapter_adds_is_its_formula(make_llama, make_bank, tokens, config: AdapterConfig):
    ids = tokens(1, LENGTH)
    bank = make_bank({"own": config}, make_llama())
    numbers = sum(t.numel() for t in bank.tensors("own").values())
    bank.route(["own"])
    added = count_forward(bank.model, ids) - count_forward(make_llama(), ids)
    if isinstance(config, LoraConfig):
        assert added.products == 2 * numbers * LENGTH
    else:
        assert added == Operations(0, 2 * numbers * LENGTH)


def test_products_that_write_into_an_operand_count():
    y, x, w = torch.zeros(2, 5, 7), torch.ones(2, 5, 3), torch.ones(2, 3, 7)
    assert count_operations(lambda: y.baddbmm_(x, w)) == Operations(2 * 2 * 5 * 3 * 7)
    assert count_operations(lambda: y[0].addmm_(x[0], w[0])) == Operations(2 * 5 * 3 * 7)


def test_a_frozen_linears_backward_takes_as_much_again():
    linear = nn.Linear(6, 8, bias=False).requires_grad_(False)
    x = torch.ones(3, 6, requires_grad=True)
    forward = count_operations(lambda: linear(x)).products
    assert count_operations(lambda: linear(x).sum().backward()).products == 2 * forward == 4 * 3 * 6 * 8


def test_operations_add_up():
    some = Operations(10, 4)
    assert (some + some, some - some, 0.5 * some, some.total) == (
        Operations(20, 8),
        Operations(),
        Operations(5, 2),
        14,
    )

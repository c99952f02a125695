"""Sensitivity of the loss to each linear, against its definition."""

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from mmpeft.adapters import AdapterBank, LoraConfig
from mmpeft.adapters.architecture import find_linears
from mmpeft.adapters.sensitivity import sensitivity, top_sites


@pytest.fixture
def loss_of(token_means):
    """The mean next-token loss of a model on (rows, length) ids."""
    return lambda model: lambda ids: token_means(model(ids).logits, ids).mean()


@pytest.fixture
def batches(tokens):
    return [tokens(2, seed=seed) for seed in range(3)]


def by_definition(model, batches, paths, loss_of) -> dict[str, float]:
    """All gradients at once, in the plainest way."""
    model = copy.deepcopy(model).requires_grad_(True)
    totals = dict.fromkeys(paths, 0.0)
    for ids in batches:
        model.zero_grad()
        loss_of(model)(ids).backward()
        for path in paths:
            weight = model.get_submodule(path).weight
            totals[path] += (weight * weight.grad).abs().sum().item() / len(batches)
    return totals


def test_it_is_the_mean_of_weight_times_gradient(tiny_llama, batches, loss_of):
    paths = list(find_linears(tiny_llama))
    got = sensitivity(tiny_llama.requires_grad_(False), batches, paths, loss_of(tiny_llama))
    assert got == pytest.approx(by_definition(tiny_llama, batches, paths, loss_of), rel=1e-5)
    assert list(got) == paths
    assert min(got.values()) > 0


def test_it_reads_conv1d_and_adapted_linears_alike(batches, loss_of):
    config = GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4)
    model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    paths = list(find_linears(model))
    wanted = by_definition(model, batches, paths, loss_of)
    assert sensitivity(model, batches, paths, loss_of(model)) == pytest.approx(wanted, rel=1e-5)
    bank = AdapterBank(model)
    bank.add("a", LoraConfig(rank=2, target_modules="all-linear"))
    bank.route([None, None])
    assert sensitivity(model, batches, paths, loss_of(model)) == pytest.approx(wanted, rel=1e-5)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_the_model_is_left_as_it_was(tiny_llama, batches, loss_of):
    tiny_llama.requires_grad_(False)
    before = {name: p.clone() for name, p in tiny_llama.named_parameters()}
    sensitivity(tiny_llama, batches, list(find_linears(tiny_llama)), loss_of(tiny_llama))
    for name, parameter in tiny_llama.named_parameters():
        assert torch.equal(parameter, before[name])
        assert not parameter.requires_grad
        assert parameter.grad is None
        assert not parameter._post_accumulate_grad_hooks


def test_gradients_of_different_weights_are_never_there_together(make_llama, tokens, loss_of):
    model = make_llama(num_hidden_layers=4).requires_grad_(False)
    paths = list(find_linears(model))
    most = 0

    def count(_):
        nonlocal most
        most = max(most, sum(model.get_submodule(path).weight.grad is not None for path in paths))

    for path in paths:  # registered first, so that it runs while the gradient is there
        weight = model.get_submodule(path).weight.requires_grad_(True)
        weight.register_post_accumulate_grad_hook(count)
        weight.requires_grad_(False)
    sensitivity(model, [tokens(2)], paths, loss_of(model))
    assert most == 1


def test_what_cannot_be_measured_is_told(tiny_llama, tokens, loss_of):
    model, path = tiny_llama.requires_grad_(False), "model.layers.0.mlp.up_proj"
    with pytest.raises(ValueError, match="no batch was given"):
        sensitivity(model, [], [path], loss_of(model))
    losses = iter([1.0, torch.nan])
    with pytest.raises(ValueError, match="the loss of batch 1 is nan"):
        sensitivity(model, [tokens(1)] * 2, [path], lambda ids: loss_of(model)(ids) * next(losses))
    unused = torch.nn.Linear(2, 2).requires_grad_(False)
    model.add_module("unused", unused)
    with pytest.raises(ValueError, match="does not depend on unused"):
        sensitivity(model, [tokens(1)], [path, "unused"], loss_of(model))
    assert not unused.weight.requires_grad
    unused.weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"unused holds its weight as torch.uint8.*without quantization"):
        sensitivity(model, [tokens(1)], ["unused"], loss_of(model))


def test_a_linear_that_does_nothing_scores_nothing(tiny_llama, batches, loss_of):
    tiny_llama.requires_grad_(False)
    tiny_llama.model.layers[0].mlp.gate_proj.weight.zero_()
    paths = ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    scores = sensitivity(tiny_llama, batches, paths, loss_of(tiny_llama))
    assert scores[paths[0]] == scores[paths[1]] == 0 < scores[paths[2]], "silu(0) closes the gate"


def test_top_sites_take_the_best_score_per_parameter():
    scores = {"large": 10.0, "small": 3.0, "middle": 8.0, "nothing": 0.1}
    costs = {"large": 100, "small": 10, "middle": 40, "nothing": 10}
    assert top_sites(scores, costs, 1000) == ["small", "middle", "large", "nothing"]
    assert top_sites(scores, costs, 50) == ["small", "middle"]
    assert top_sites(scores, costs, 49) == ["small", "nothing"], "one that does not fit is passed over"


@pytest.mark.parametrize(
    ("costs", "budget", "words"),
    [
        ({"a": 10, "b": 20}, 9, "a budget of 9 parameters pays for no site .the cheapest: 10"),
        ({"a": 10}, 90, "no count of parameters for b"),
        ({"a": 10, "b": 0}, 90, "no count of parameters for b"),
    ],
)
def test_impossible_budgets_are_told(costs, budget, words):
    with pytest.raises(ValueError, match=words):
        top_sites({"a": 1.0, "b": 2.0}, costs, budget)

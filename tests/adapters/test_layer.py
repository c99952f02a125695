"""One adapted linear by itself, its errors, and the model under gradient checkpointing."""

import pytest
import torch
from torch import nn

from mmpeft.adapters import AdapterBank, IA3Config, LoraConfig
from tests.conftest import MIXED


@pytest.fixture
def layer_and_bank(make_bank):
    """A bank on a single linear: LoRA in "lora", IA3 on its output in "out" and on its input in "in"."""
    model = nn.Sequential(nn.Linear(8, 6))
    configs = {"lora": LoraConfig(rank=2, alpha=3, target_modules=["0"])}
    configs |= {"out": IA3Config(["0"], []), "in": IA3Config(["0"], ["0"])}
    bank = make_bank(configs, model=model)
    return model, bank


def test_each_row_gets_the_formula_of_its_own_method(layer_and_bank):
    model, bank = layer_and_bank
    W, bias = model[0].weight.double(), model[0].bias.double()
    x = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(0))
    bank.route(["in", "lora", None, "out"])
    got = model(x)
    x = x.double()
    A, B = (t.double() for t in bank.tensors("lora").values())
    before, after = (bank.tensors(name)["0.ia3_l"].double().flatten() for name in ("in", "out"))
    want = [
        (x[0] * before) @ W.T + bias,
        x[1] @ W.T + bias + 1.5 * x[1] @ A.T @ B.T,
        x[2] @ W.T + bias,
        (x[3] @ W.T + bias) * after,
    ]
    torch.testing.assert_close(got.double(), torch.stack(want), rtol=1e-5, atol=1e-6)


def test_forward_before_routing_says_how_to_route(layer_and_bank):
    """A forward that fell back to the base would serve the wrong model in silence."""
    with pytest.raises(ValueError, match=r"no routing for .*bank\.route\(\['my-adapter', None\]\)"):
        layer_and_bank[0](torch.ones(1, 2, 8))


@pytest.mark.parametrize("shape", [(1, 2, 8), (3, 2, 8), (2, 8)])
def test_a_wrong_number_of_rows_is_refused_with_both_counts(layer_and_bank, shape):
    """(2, 8) has the rows but no token dimension: it could as well be two tokens of one row."""
    model, bank = layer_and_bank
    bank.route(["lora", None])
    with pytest.raises(ValueError, match=rf"shape \({shape[0]}, .*written for 2 rows .*bank\.route\(names\)"):
        model(torch.ones(shape))


def test_two_banks_do_not_see_each_other_rows(make_bank, logits_of, tokens):
    """The routing is an object of its model, not a global."""
    first, second = make_bank(), make_bank()
    ids = tokens(2)
    first.route(["small", "tfew"])
    logits_of(second, ["large"], ids[:1])
    with torch.no_grad():
        left_alone = first.model(ids).logits
    assert torch.equal(left_alone, logits_of(first, ["small", "tfew"], ids))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient_and_loses_none(
    make_bank, tokens, token_means, gradients_of, use_reentrant
):
    """The backward runs the forward again, so the routing must still stand: it is never cleared."""
    names = [*MIXED, None]
    ids, gradients = tokens(len(names)), []
    for checkpointing in (False, True):
        bank = make_bank()
        bank.train()
        if checkpointing:
            bank.model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        embeds = bank.model.get_input_embeddings()(ids).requires_grad_()
        bank.route(names)
        logits = bank.model(inputs_embeds=embeds, use_cache=False).logits
        token_means(logits, ids).sum().backward()
        gradients.append(
            {f"{n} {k}": g for n in filter(None, names) for k, g in gradients_of(bank, n).items()}
        )
        gradients[-1]["inputs"] = embeds.grad
    plain, checkpointed = gradients
    for key, gradient in plain.items():
        assert gradient.any(), f"{key} has no gradient"
        assert torch.equal(gradient, checkpointed[key]), key


def test_the_wrapped_linear_still_shows_its_weight(make_llama):
    """Some models read ``weight.dtype`` of their linears."""
    model = make_llama().bfloat16()
    weight = model.model.layers[0].self_attn.q_proj.weight
    AdapterBank(model).add("a", LoraConfig())
    assert model.model.layers[0].self_attn.q_proj.weight is weight

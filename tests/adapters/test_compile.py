"""The adapted model is one graph, and which finetune serves a row is data to it."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from mmpeft.adapters import IA3Config, LoraConfig
from tests.conftest import MIXED

NAMES = [*MIXED, None]
ROUTES = [
    NAMES,
    NAMES[::-1],
    ["tfew"] * len(NAMES),
    ["small"] * len(NAMES),
    [None] * len(NAMES),
]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_explain_reports_one_graph_and_no_break(make_bank, tokens):
    bank = make_bank()
    bank.route(ROUTES[0])
    explanation = torch._dynamo.explain(bank.model)(input_ids=tokens(len(NAMES)), use_cache=False)
    assert explanation.graph_count == 1
    assert explanation.graph_break_count == 0, explanation.break_reasons


@pytest.mark.parametrize("training", [False, True])
def test_rerouting_compiles_nothing_anew(make_bank, logits_of, tokens, training):
    """And the compiled graph follows the route: equal to eager mode for each (same kernels, so bitwise)."""
    bank, ids, counter = make_bank(), tokens(len(NAMES)), CompileCounter()
    bank.train(training)
    compiled = torch.compile(bank.model, backend=counter, fullgraph=True)
    for names in ROUTES:
        bank.route(names)
        got = compiled(ids, use_cache=False).logits
        assert got.requires_grad
        assert torch.equal(got.detach(), logits_of(bank, names, ids))
    assert counter.frame_count == 1


def test_loading_and_unloading_within_the_reserve_compiles_nothing_anew(
    make_bank, randomise, tokens, logits_of
):
    """A server does so while it runs. Here the last free slot is taken, emptied and taken again."""
    bank, ids, counter = make_bank(reserve={"lora": (4, 8)}), tokens(2), CompileCounter()
    compiled = torch.compile(bank.model, backend=counter, fullgraph=True)
    for unloaded, loaded in ((None, "large"), (None, "third"), ("small", "large"), (None, "fourth")):
        if unloaded:
            bank.remove(unloaded)
        if loaded not in bank:
            bank.add(loaded, LoraConfig(rank=4, target_modules="all-linear"))
            randomise(bank, loaded)
        bank.route([loaded, "tfew"])
        got = compiled(ids, use_cache=False).logits
        assert torch.equal(got.detach(), logits_of(bank, [loaded, "tfew"], ids))
    assert counter.frame_count == 1


@pytest.mark.slow
def test_the_backward_of_the_compiled_graph_gives_the_same_gradients(
    make_bank, tokens, token_means, gradients_of
):
    """Traced by AOTAutograd; its decompositions may round differently from eager mode."""
    ids, gradients = tokens(len(NAMES)), []
    for compiling in (False, True):
        bank = make_bank()
        bank.route(ROUTES[0])
        model = torch.compile(bank.model, backend="aot_eager", fullgraph=True) if compiling else bank.model
        token_means(model(ids, use_cache=False).logits, ids).sum().backward()
        gradients.append({f"{n} {k}": g for n in bank.names for k, g in gradients_of(bank, n).items()})
    for key, eager in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], eager, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("config", [LoraConfig(rank=4), IA3Config()])
def test_a_bank_of_one_compiles_once_for_full_and_once_for_mixed_batches(make_bank, tokens, config):
    """The short cut for a single finetune is a branch of the trace, so two graphs and no more."""
    bank, ids, counter = make_bank({"a": config}), tokens(2), CompileCounter()
    compiled = torch.compile(bank.model, backend=counter, fullgraph=True)
    for names in (["a", "a"], ["a", None], ["a", "a"], [None, None], [None, "a"]):
        bank.route(names)
        compiled(ids, use_cache=False)
    assert counter.frame_count == 2

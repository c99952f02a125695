"""Ranked scores come from a head in float32, whatever the model's dtype; a float32 model's are the same to the bit."""

import pytest
import torch
from torch.nn import functional as F

from mmpeft.adapters import LoraConfig
from mmpeft.models import float32_head as module
from mmpeft.models.float32_head import float32_head


@pytest.mark.parametrize("chunk_bytes", [7 * 64 * 4, 2**22])
def test_logits_are_the_exact_products(make_model, monkeypatch, chunk_bytes):
    model = make_model(dtype="bfloat16")
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk_bytes)
    hidden = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    head = model.language_model.get_output_embeddings()
    exact = F.linear(hidden.double(), head.weight.double())
    rounded, told = (model.reader.logits(hidden, in_float32) for in_float32 in (False, True))
    assert rounded.dtype == torch.bfloat16
    assert told.dtype == torch.float32
    torch.testing.assert_close(told.double(), exact, atol=1e-5, rtol=1e-5)
    assert (rounded.double() - exact).abs().max() > 1e-3, "what the float32 head is for"
    assert "forward" not in head.__dict__
    assert torch.equal(model.reader.logits(hidden), rounded)


def test_losses_use_it(make_model, make_batch, conversations):
    model = make_model(dtype="bfloat16")
    batch = make_batch([conversations("a", ("what?", "a red square"))], ["lora"])
    with torch.no_grad():
        hidden = model.hidden_states(batch)
        told = model.token_losses(batch, in_float32=True)
        labelled = batch.targets != -100
        logits = F.linear(
            hidden[labelled].double(), model.language_model.get_output_embeddings().weight.double()
        )
        wanted = F.cross_entropy(logits, batch.targets[labelled], reduction="none")
        torch.testing.assert_close(told.nll.double(), wanted, atol=1e-5, rtol=1e-5)
        assert (model.token_losses(batch).nll.double() - wanted).abs().max() > 1e-4


def test_a_float32_model_computes_what_it_did(make_model, make_batch, conversations):
    model = make_model()
    batch = make_batch([conversations("a", ("what?", "red"), ("is it?", "yes"))], ["ia3"])
    with torch.no_grad():
        assert torch.equal(model.token_losses(batch).nll, model.token_losses(batch, in_float32=True).nll)


def test_a_head_that_adapters_change_stays_what_it_was_trained_as(make_model, randomise):
    model = make_model(dtype="bfloat16")
    model.bank.add("head", LoraConfig(rank=2, target_modules=["lm_head"]))
    randomise(model.bank, "head")
    hidden = torch.randn(3, 64).bfloat16()
    with torch.no_grad():
        assert torch.equal(
            model.logits(hidden, ["head", None, "lora"]),
            model.logits(hidden, ["head", None, "lora"], in_float32=True),
        )


def test_an_error_inside_leaves_the_head_as_it_was(make_model):
    model = make_model(dtype="bfloat16").language_model
    with pytest.raises(RuntimeError, match="inside"):
        with float32_head(model):
            raise RuntimeError("inside")
    assert "forward" not in model.get_output_embeddings().__dict__

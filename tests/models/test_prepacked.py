"""Prepacked weights: a step of decoding has the bits of one without, and leaves the model as it was."""

import pytest
import torch
from torch import nn

from mmpeft.inference.decoding import Decoder, Sampling
from mmpeft.models import prepacked

pytestmark = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN multiplies no bf16 on this processor"
)
NAMES = ["lora", None, "ia3"]


@pytest.fixture
def make_decoder(make_model, make_batch, conversations):
    """Of the same conversations each time; with them come what its steps compute."""

    def make(model=None):
        model = make_model(dtype="bfloat16") if model is None else model
        rows = [conversations("a", ("what color is it?", ""), ("why?", ""), prompts=True) for _ in NAMES]
        decoder = Decoder(model, -5)
        decoder.join(make_batch(rows, NAMES), [Sampling(8)] * 6)
        return decoder

    return make


def steps(decoder, number=4):
    """The tokens and hidden states of some steps."""
    return [([step.token for step in decoder.step()], decoder._hidden.clone()) for _ in range(number)]


def assert_same(got, want):
    for (tokens, hidden), (expected, expected_hidden) in zip(got, want, strict=True):
        assert tokens == expected
        assert torch.equal(hidden, expected_hidden)


def test_a_step_has_the_bits_of_one_with_plain_weights(make_decoder, monkeypatch):
    decoder = make_decoder()
    got = steps(decoder)
    model = decoder.model
    every = {module for module in model.language_model.modules() if type(module) is nn.Linear}
    assert set(model.reader.prepacked._packed) == every
    monkeypatch.setattr(prepacked, "SHARE", 0)
    plain = make_decoder()
    assert_same(got, steps(plain))
    assert not plain.model.reader.prepacked._packed


def test_the_model_is_as_before_after_every_step(make_decoder):
    decoder = make_decoder()
    layers = decoder.model.bank.layers.values()
    plain, forwards = [layer.plain for layer in layers], forwards_of(decoder.model)
    steps(decoder, 1)
    assert [layer.plain for layer in layers] == plain
    assert forwards_of(decoder.model) == forwards


def forwards_of(model):
    return {name: vars(module).get("forward") for name, module in model.language_model.named_modules()}


def test_a_weight_that_has_changed_is_laid_out_anew(make_decoder):
    decoder = make_decoder()
    steps(decoder, 1)
    with torch.no_grad():
        for weight in decoder.model.language_model.parameters():
            weight.mul_(1.25)
    other = make_decoder()
    with torch.no_grad():
        for weight in other.model.language_model.parameters():
            weight.mul_(1.25)
    assert_same(steps(make_decoder(decoder.model)), steps(make_decoder(other.model)))


def test_gradients_are_those_of_the_plain_weights(make_decoder):
    decoder = make_decoder()
    steps(decoder, 1)
    model = decoder.model
    model.bank.route([None])

    def gradient():
        embeds = torch.ones(1, 2, model.reader.config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        model.reader.decode(embeds, None, torch.arange(2)[None])[0].square().sum().backward()
        return embeds.grad

    with model.reader.prepacked.in_use(model.bank.layers.values()):
        inside = gradient()
    assert torch.equal(inside, gradient())

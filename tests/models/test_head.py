"""Adapters of the output head: losses, ranking and answers are those of a bank on the language model alone."""

import pytest
import torch
from torch.nn import functional as F

from mmpeft.adapters import AdapterBank, DoraConfig, FullConfig, HybridConfig, LoraConfig
from mmpeft.data.batch import collate
from mmpeft.data.packing import pack, pack_choices
from mmpeft.data.template import IGNORE_INDEX, ChoiceSet, Encoded
from mmpeft.inference.adapter_check import check_adapters
from mmpeft.inference.decoding import generate
from mmpeft.models.token_losses import length_normalised
from mmpeft.tools.tiny_models import tiny_model
from tests.inference.test_self_check import wrapped

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
HEADS = {
    "lora": LoraConfig(rank=4, target_modules=["q_proj", "lm_head"]),
    "alone": LoraConfig(rank=3, target_modules=["lm_head"]),
    "dora": DoraConfig(rank=2, target_modules=["lm_head", "v_proj"]),
    "whole": HybridConfig([FullConfig(["lm_head"]), LoraConfig(rank=2)]),
    "plain": LoraConfig(rank=2),
    None: None,
}
PROMPTS = [[20, 31, 42, 53, 64, 75, 86], [20, 31, 42, 97, 98]]
NEW = 4
NO_END = -5


def encoded(ids):
    targets = [*ids[1:], 7]
    return Encoded(ids, [IGNORE_INDEX] * (len(ids) - 3) + targets[-3:])


def fill(bank, randomise):
    for name, config in HEADS.items():
        if name is not None:
            bank.add(name, config)
            randomise(bank, name)
    return bank


@pytest.fixture(params=["llama", "jamba"])
def pair(request, randomise):
    """A model, packed or unpacked, and a bank with the same finetunes on its language model alone."""
    model = wrapped(request.param)
    if request.param == "jamba":
        from mmpeft.inference.self_check import check_language_model

        check_language_model(model)
    fill(model.bank, randomise)
    return model, fill(AdapterBank(tiny_model(request.param).requires_grad_(False)), randomise)


def alone(bank, name, ids):
    """(tokens, vocabulary) of one conversation in a row of its own."""
    bank.route([name])
    return bank.model(torch.tensor([ids]), use_cache=False).logits[0]


def losses_alone(bank, name, ids):
    conversation = encoded(ids)
    targets = torch.tensor(conversation.targets)
    nll = F.cross_entropy(alone(bank, name, ids), targets, reduction="none")
    return nll[targets != IGNORE_INDEX]


def test_losses_and_gradients_are_those_of_rows_alone(pair):
    model, bank = pair
    names = list(HEADS)
    batch = collate([pack([encoded(ids) for ids in PROMPTS])] * len(names), None, names)
    losses = model.token_losses(batch)
    want = torch.cat([losses_alone(bank, name, ids) for name in names for ids in PROMPTS])
    torch.testing.assert_close(losses.nll, want, **CLOSE)
    losses.nll.sum().backward()
    want.sum().backward()
    for (key, own), other in zip(model.bank.named_parameters(), bank.parameters(), strict=True):
        torch.testing.assert_close(
            own.grad, other.grad, rtol=1e-3, atol=1e-4, msg=lambda m, key=key: f"{key}: {m}"
        )
    assert all(own.grad.abs().max() > 0 for key, own in model.bank.named_parameters() if "lm_head" in key)


@torch.no_grad()
def test_choices_are_ranked_as_alone(pair):
    model, bank = pair
    names, choices = list(HEADS), [[*PROMPTS[0], 11, 12], [*PROMPTS[0], 13, 14]]
    conversations = [Encoded(ids, [IGNORE_INDEX] * 6 + [*ids[7:], 7]) for ids in choices]
    row = pack_choices(ChoiceSet(conversations, None))
    scores = length_normalised(model.token_losses(collate([row] * len(names), None, names)), len(names))
    for name, own in zip(names, scores, strict=True):
        for one, score in zip(conversations, own, strict=True):
            targets = torch.tensor(one.targets)
            nll = F.cross_entropy(alone(bank, name, one.ids), targets, ignore_index=IGNORE_INDEX)
            torch.testing.assert_close(score, -nll, **CLOSE)


@torch.no_grad()
def test_answers_are_those_of_the_language_model_alone(pair):
    model, bank = pair
    names = list(HEADS)
    batch = collate([pack([encoded(ids) for ids in PROMPTS])] * len(names), None, names)
    answers = generate(model, batch, NO_END, NEW)
    for name, row in zip(names, answers, strict=True):
        for ids, answer in zip(PROMPTS, row, strict=True):
            written = [*ids]
            for _ in range(NEW):
                written.append(int(alone(bank, name, written)[-1].argmax()))
            assert answer == written[len(ids) :], name
    assert len({str(row) for row in answers}) > 3


def test_what_the_head_drops_is_each_finetunes_own(randomise):
    """Joint training equals separate training."""
    model = wrapped("llama")
    for name in ("a", "b"):
        model.bank.add(name, LoraConfig(rank=4, dropout=0.5, target_modules=["lm_head", "q_proj"]))
        randomise(model.bank, name)
    model.train()
    rows, seeds = [pack([encoded(ids) for ids in PROMPTS]), pack([encoded(PROMPTS[1])])], {"a": 1, "b": 2}

    def losses(some, names):
        batch = collate([rows[n] for n in some], None, names)
        batch.dropout_seeds = {name: seeds[name] for name in names}
        return model.token_losses(batch).nll

    together = losses([0, 1, 1], ["a", "b", "a"])
    of_a = losses([0, 1], ["a", "a"])
    torch.testing.assert_close(together[[0, 1, 2, 3, 4, 5, 9, 10, 11]], of_a, **CLOSE)
    torch.testing.assert_close(together[6:9], losses([1], ["b"]), **CLOSE)
    model.eval()
    assert (losses([0, 1], ["a", "a"]) - of_a).abs().max() > 0.01


def test_under_gradient_checkpointing_the_decoder_is_routed_as_before(randomise):
    grads = []
    for checkpointing in (False, True):
        model = wrapped("llama").train()
        fill(model.bank, randomise)
        if checkpointing:
            model.language_model.activation_checkpointing_enable({"use_reentrant": False})
        batch = collate(
            [pack([encoded(ids)]) for ids in (*PROMPTS, *PROMPTS)], None, ["lora", None, "plain", "lora"]
        )
        model.token_losses(batch).nll.sum().backward()
        grads.append([parameter.grad for parameter in model.bank.parameters()])
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_the_check_of_finetunes_reads_the_head(randomise):
    model = wrapped("llama")
    fill(model.bank, randomise)
    assert len(check_adapters(model, {})["adapters"]) == 5

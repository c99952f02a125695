"""Prompts, prefixes and image prompts: PEFT is the oracle, and rows of every method share a batch exactly."""

import numpy as np
import peft
import pytest
import torch
from transformers import DynamicCache

from mmpeft.adapters import (
    HybridConfig,
    ImagePromptConfig,
    LoraConfig,
    PrefixConfig,
    PromptConfig,
    PTuningConfig,
)
from mmpeft.adapters.peft_format import load_adapter, read_config, save_adapter
from mmpeft.data.template import IGNORE_INDEX
from mmpeft.errors import RefusedError
from mmpeft.inference.decoding import generate
from mmpeft.models.frozen import READS_CACHE, recompute
from mmpeft.models.language import LanguageConfig, load_language_model
from tests.inference.test_self_check import packed_batch, wrapped

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
CONFIGS = {
    "prompt": PromptConfig(5),
    "p_tuning": PTuningConfig(3),
    "prefix": PrefixConfig(4),
    "both": HybridConfig([PrefixConfig(2), PromptConfig(6), LoraConfig(rank=2)]),
    "patches": ImagePromptConfig(),
}
NAMES = ["prompt", "lora", "prefix", None, "both", "p_tuning", "ia3", "patches"]


@pytest.fixture
def model(make_model, randomise):
    """A model with LoRA, IA3 and every method that changes what it reads."""
    model = make_model()
    for name, config in CONFIGS.items():
        model.bank.add(name, config)
        if name != "p_tuning":  # starts at random already
            randomise(model.bank, name)
    return model


@pytest.fixture
def dropping(make_model, randomise):
    """A model in training whose finetunes drop features, beside virtual tokens of three lengths."""
    model = make_model()
    for name, virtual in (("long", PromptConfig(5)), ("short", PromptConfig(2)), ("keys", PrefixConfig(3))):
        model.bank.add(name, HybridConfig([virtual, LoraConfig(rank=4, dropout=0.3)]))
        randomise(model.bank, name)
    return model.train()


@pytest.fixture
def rows(conversations):
    questions = [("what color is it?", "red"), ("is it red?", "yes it is"), ("a?", "b")]
    images = ["a", "b", "a", "", "bc", "", "c", "a"]
    return [conversations(each, *questions) for each in images]


def separate(rows, names):
    return [[one] for row in rows for one in row], [
        n for row, n in zip(rows, names, strict=True) for _ in row
    ]


def test_what_a_finetune_drops_depends_on_no_neighbour(dropping, make_batch, conversations):
    """Its rows, packed and padded, virtual tokens among them, are those of a batch of its own; others stand between."""
    names = ["short", "lora", "long", "keys", "short"]
    questions = [("what color is it?", "red"), ("a?", "b"), ("is it red?", "yes " * 9)]
    rows = [conversations("ab"[number % 2], *questions[: 1 + number % 3]) for number in range(len(names))]
    seeds = {name: number for number, name in enumerate(names)}
    joint = make_batch(rows, names)
    joint.dropout_seeds = seeds
    together = dropping.token_losses(joint)
    for name in seeds:
        own = [number for number, each in enumerate(names) if each == name]
        batch = make_batch([rows[number] for number in own], [name] * len(own))
        batch.dropout_seeds = {name: seeds[name]}
        want = dropping.token_losses(batch).nll
        got = together.nll[np.isin(together.rows, own)]
        torch.testing.assert_close(got, want, **CLOSE)
        batch.dropout_seeds = {name: 77}
        assert torch.allclose(dropping.token_losses(batch).nll, want) == (name == "lora")


def test_packed_mixed_rows_have_the_losses_of_rows_of_their_own(model, make_batch, rows):
    packed = model.token_losses(make_batch(rows, NAMES))
    alone = model.token_losses(make_batch(*separate(rows, NAMES)))
    torch.testing.assert_close(packed.nll, alone.nll, **CLOSE)
    for number, name in enumerate(NAMES):
        own = model.token_losses(make_batch([rows[number]], [name]))
        torch.testing.assert_close(packed.nll[packed.rows == number], own.nll, **CLOSE)
        base = model.token_losses(make_batch([rows[number]], [None]))
        assert name is None or not torch.allclose(own.nll, base.nll, atol=1e-3), f"{name} changes nothing"


def test_packed_mixed_answers_are_those_of_rows_of_their_own(model, make_batch, conversations):
    questions = [("what color is it?", ""), ("is it red?", ""), ("why?", "")]
    rows = [conversations(each, *questions, prompts=True) for each in ["a", "b", "", "", "bc", "", "c", "a"]]
    packed = generate(model, make_batch(rows, NAMES), eos_token_id=-5, max_new_tokens=6)
    alone = generate(model, make_batch(*separate(rows, NAMES)), eos_token_id=-5, max_new_tokens=6)
    assert [answer for row in packed for answer in row] == [answer for (answer,) in alone]


def test_every_method_learns_from_its_own_rows_alone(model, make_batch, rows):
    losses = model.token_losses(make_batch(rows, NAMES))
    losses.nll[losses.rows != NAMES.index("prompt")].sum().backward()
    for name in CONFIGS:
        for _, stack, slot in model.bank.places(name):
            gradients = [p.grad[slot] for p in stack.parameters() if p.grad is not None]
            assert bool(gradients and any(g.any() for g in gradients)) is (name != "prompt"), name


def test_a_diverged_prompt_stays_in_its_row(model, make_batch, rows, poison):
    want = model.token_losses(make_batch(rows, NAMES))
    for sick in ("prompt", "prefix", "patches"):
        poison(model.bank, sick)
    sick_rows = np.array([name in ("prompt", "prefix", "patches") for name in NAMES])
    got = model.token_losses(make_batch(rows, NAMES))
    assert not got.nll[sick_rows[got.rows]].isfinite().any()
    assert torch.equal(got.nll[~sick_rows[got.rows]], want.nll[~sick_rows[got.rows]])


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")  # PEFT's own call
@pytest.mark.parametrize("name", ["prompt", "p_tuning", "prefix"])
def test_files_go_both_ways_with_peft_and_compute_the_same(
    model, make_model, make_batch, conversations, tiny_base, tmp_path, name
):
    save_adapter(model.bank, name, tmp_path / "ours", "tiny")
    base = load_language_model(LanguageConfig(str(tiny_base / "language"), dtype="float32"))
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    (one,) = conversations("", ("what color is it?", "red and green"))
    with torch.no_grad():
        logits = theirs(torch.tensor([one.ids])).logits[0, -len(one.ids) :]
    places = torch.tensor(one.targets) != IGNORE_INDEX
    want = torch.nn.functional.cross_entropy(
        logits[places], torch.tensor(one.targets)[places], reduction="none"
    )
    batch = make_batch([[one]], [name])
    torch.testing.assert_close(model.token_losses(batch).nll, want, **CLOSE)

    theirs.save_pretrained(tmp_path / "theirs")
    again = make_model()
    load_adapter(again.bank, name, tmp_path / "theirs")
    (got,), (ours,) = again.bank.tensors(name).values(), model.bank.tensors(name).values()
    assert torch.equal(got, ours)
    torch.testing.assert_close(again.token_losses(batch).nll, want, **CLOSE)


def test_a_hybrid_comes_back_from_its_files(model, make_model, make_batch, rows, tmp_path):
    save_adapter(model.bank, "both", tmp_path, "tiny")
    assert [type(part) for part in read_config(tmp_path).parts()] == [PrefixConfig, PromptConfig, LoraConfig]
    again = make_model()
    load_adapter(again.bank, "both", tmp_path)
    batch = make_batch([rows[4]], ["both"])
    assert torch.equal(again.token_losses(batch).nll, model.token_losses(batch).nll)
    assert len(list(tmp_path.rglob("adapter_model.safetensors"))) == 3


def test_an_image_prompt_is_part_of_the_features(model, make_batch, rows):
    batch = make_batch([rows[0]], ["patches"])
    changed = make_batch([rows[0]], [None])
    changed.features = changed.features + model.bank.tensors("patches")["patch_delta"]
    torch.testing.assert_close(model.token_losses(batch).nll, model.token_losses(changed).nll, **CLOSE)


def test_layers_that_recompute_read_the_prefix_again(make_model, make_batch, randomise, rows, caplog):
    """Transformers by itself would drop the cache that holds it, and train as if there were none."""
    names, gradients, forwards = ["prefix", "both", "lora", "ia3"], [], []
    for recomputing in (False, True):
        model = make_model(gradient_checkpointing=recomputing)
        for name in ("prefix", "both"):
            model.bank.add(name, CONFIGS[name])
            randomise(model.bank, name)
        forwards.clear()
        model.language_model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: forwards.append(1))
        model.train().token_losses(make_batch(rows[:4], names)).nll.sum().backward()
        assert len(forwards) == 1 + recomputing
        gradients.append([parameter.grad for parameter in model.bank.parameters()])
    assert all(gradient is not None and gradient.any() for gradient in gradients[0])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)
    assert "incompatible" not in caplog.text


def test_a_prefix_whose_layers_would_lose_it_is_refused(make_model, make_batch, rows, monkeypatch):
    model = make_model(gradient_checkpointing=True)
    model.bank.add("prefix", PrefixConfig(2))
    model.train()
    with pytest.raises(RefusedError, match="gradient_checkpointing to false"):
        model.token_losses(make_batch(rows[:1], ["prefix"]), DynamicCache())
    for layer in model.language_model.model.layers:
        monkeypatch.setattr(layer, READS_CACHE, False)
    with pytest.raises(RefusedError, match=r"LlamaDecoderLayer .*gradient_checkpointing to false"):
        model.token_losses(make_batch(rows[:1], ["prefix"]))


@pytest.mark.parametrize("tokens", [0, -1, 2.5])
def test_a_prompt_needs_a_length(tokens):
    with pytest.raises(ValueError, match="num_virtual_tokens"):
        PromptConfig(tokens)


def test_an_image_prompt_needs_a_model_that_reads_images(make_bank):
    with pytest.raises(ValueError, match="language model alone"):
        make_bank({"a": ImagePromptConfig()})


@pytest.mark.parametrize("family", ["gpt2", "gemma3_text", "falcon", "mpt", "qwen3_moe"])
def test_every_family_reads_a_prefix_that_nothing_is_added_to(family, randomise):
    """As from a cache that keeps all, and again where it recomputes."""
    model = wrapped(family)
    model.bank.add("prefix", PrefixConfig(3))
    randomise(model.bank, "prefix")
    losses, gradients = [], []
    for cache, recomputing in ((DynamicCache(), False), (None, False), (None, True)):
        if recomputing:
            recompute(model.language_model)
            model.train()
        losses.append(model.token_losses(packed_batch(["prefix", None]), cache).nll)
        gradients.append(torch.autograd.grad(losses[-1].sum(), list(model.bank.parameters()))[0])
    half = len(losses[0]) // 2
    assert not torch.allclose(losses[0][:half], losses[0][half:], atol=1e-2)
    for loss, gradient in zip(losses[1:], gradients[1:], strict=True):
        torch.testing.assert_close(loss, losses[0])
        torch.testing.assert_close(gradient, gradients[0])

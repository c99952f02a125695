"""Forgetting is measured as Hugging Face's own losses have it, whatever shares the batch; the base's hash sees all."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from mmpeft.adapters import (
    BottleneckConfig,
    HybridConfig,
    IA3Config,
    LoraConfig,
    PrefixConfig,
    PromptConfig,
)
from mmpeft.evaluation import forgetting
from mmpeft.evaluation.forgetting import measure_forgetting
from mmpeft.hashing import hash_tensors
from mmpeft.models.build import build_model
from mmpeft.models.language import LanguageConfig
from mmpeft.models.vision import VisionConfig
from mmpeft.runs.identity import base_hash

TEXTS = [
    "is it red? yes no, it is a red square on nothing else",
    "one, two",
    "[INST] <Img></Img> [vqa] a marker in a text is text [/INST]",
    "how many squares are there? " * 3,
    "Ünïcödé 12345 \n\t emoji 🙂",
]
CLOSE = 1e-5


@pytest.fixture(scope="module")
def make_model(tiny_base):
    """Builds the same model each time, in fp32 unless told."""

    def make(**language):
        torch.manual_seed(0)
        config = LanguageConfig(str(tiny_base / "language"), **({"dtype": "float32"} | language))
        vision = VisionConfig("test_vit", str(tiny_base / "vision.safetensors"), image_size=32, crop=False)
        return build_model(config, vision)

    return make


@pytest.fixture
def model(make_model, randomise):
    """With a LoRA, an IA3 and a prompt far from the base, and an untrained LoRA."""
    model = make_model()
    model.bank.add("lora", LoraConfig(rank=4))
    model.bank.add("tfew", IA3Config())
    model.bank.add("prompt", HybridConfig([PromptConfig(3), IA3Config()]))
    for name in model.bank.names:
        randomise(model.bank, name)
    model.bank.add("untrained", LoraConfig(rank=4))
    return model


@torch.no_grad()
def log_probabilities(model, ids: list[int], adapter) -> torch.Tensor:
    """(tokens - 1, vocabulary) by Hugging Face's own forward of one text, without us but for the adapter."""
    model.bank.route([adapter])
    return model.language_model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)


def token_ids(tokenizer, text: str) -> list[int]:
    return [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]


@pytest.mark.parametrize("text", TEXTS)
def test_perplexity_is_that_of_hugging_faces_own_loss(model, tiny_tokenizer, text):
    ids = torch.tensor([token_ids(tiny_tokenizer, text)])
    found = measure_forgetting(model, tiny_tokenizer, [text], "lora")
    assert found.num_tokens == ids.shape[1] - 1
    for adapter, perplexity in ((None, found.base_perplexity), ("lora", found.perplexity)):
        model.bank.route([adapter])
        with torch.no_grad():
            loss = model.language_model(ids, labels=ids).loss
        assert perplexity == pytest.approx(math.exp(loss), rel=CLOSE)


def test_all_measures_equal_those_from_whole_logits(model, tiny_tokenizer):
    found = measure_forgetting(model, tiny_tokenizer, TEXTS, "tfew", batch_size=3)
    losses, same, divergences = {None: [], "tfew": []}, [], []
    for text in TEXTS:
        ids = token_ids(tiny_tokenizer, text)
        logs = {name: log_probabilities(model, ids, name) for name in losses}
        for name, own in logs.items():
            losses[name].append(F.nll_loss(own, torch.tensor(ids[1:]), reduction="none"))
        base, own = logs[None], logs["tfew"]
        same.append(base.argmax(-1) == own.argmax(-1))
        divergences.append(F.kl_div(own, base, log_target=True, reduction="none").sum(-1))
    assert found.base_perplexity == pytest.approx(math.exp(torch.cat(losses[None]).mean()), rel=CLOSE)
    assert found.perplexity == pytest.approx(math.exp(torch.cat(losses["tfew"]).mean()), rel=CLOSE)
    assert found.agreement == pytest.approx(float(torch.cat(same).float().mean()))
    assert found.divergence == pytest.approx(float(torch.cat(divergences).mean()), rel=1e-4)
    assert found.num_tokens == len(torch.cat(same))
    assert 0 < found.agreement < 1
    assert found.divergence > 0.01


@pytest.mark.parametrize("adapter", ["lora", "prompt"])
@pytest.mark.parametrize("at_once", [1, 7, 256])
def test_neither_batches_nor_chunks_nor_order_change_anything(
    model, tiny_tokenizer, adapter, at_once, monkeypatch
):
    wanted = measure_forgetting(model, tiny_tokenizer, TEXTS, adapter, batch_size=1)
    monkeypatch.setattr(forgetting, "POSITIONS_AT_ONCE", at_once)
    for batch_size in (2, 5, 100):
        found = measure_forgetting(model, tiny_tokenizer, TEXTS[::-1], adapter, batch_size=batch_size)
        assert vars(found) == pytest.approx(vars(wanted), rel=CLOSE)
    assert wanted.divergence > 0.1


@pytest.mark.parametrize("adapter", ["untrained", None])
def test_what_was_not_trained_has_forgotten_nothing(model, tiny_tokenizer, adapter):
    found = measure_forgetting(model, tiny_tokenizer, TEXTS, adapter)
    assert found.agreement == 1.0
    assert found.perplexity == pytest.approx(found.base_perplexity, rel=1e-6)
    assert abs(found.divergence) < 1e-6


def test_logits_never_fill_the_memory(model, tiny_tokenizer, monkeypatch):
    sizes = []
    own = model.logits
    monkeypatch.setattr(forgetting, "POSITIONS_AT_ONCE", 16)
    monkeypatch.setattr(
        model, "logits", lambda hidden, names: sizes.append(len(hidden)) or own(hidden, names)
    )
    measure_forgetting(model, tiny_tokenizer, TEXTS, "lora")
    assert max(sizes) == 16


def test_a_long_text_is_cut_and_begins_where_the_tokenizer_says(model, tiny_tokenizer):
    cut = measure_forgetting(model, tiny_tokenizer, [TEXTS[0]], "lora", max_tokens=6)
    assert cut.num_tokens == 5
    logs = log_probabilities(model, ids := token_ids(tiny_tokenizer, TEXTS[0])[:6], None)
    assert cut.base_perplexity == pytest.approx(math.exp(F.nll_loss(logs, torch.tensor(ids[1:]))), rel=CLOSE)
    tokenizer = copy.deepcopy(tiny_tokenizer)  # the session's own is shared
    tokenizer.bos_token = None
    bare = measure_forgetting(model, tokenizer, [TEXTS[0]], "lora", max_tokens=6)
    logs = log_probabilities(model, ids := tokenizer(TEXTS[0])["input_ids"][:6], None)
    assert bare.base_perplexity == pytest.approx(math.exp(F.nll_loss(logs, torch.tensor(ids[1:]))), rel=CLOSE)


def test_a_control_token_in_a_text_is_text(model, tiny_tokenizer):
    found = measure_forgetting(model, tiny_tokenizer, ["a <|im_end|> b"], "lora")
    assert found.num_tokens > len("<|im_end|>"), "every letter but few is a token of its own"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"texts": []}, ValueError, "found 0 texts"),
        ({"batch_size": 0}, ValueError, "batch_size 0; all must be at least 1"),
        ({"texts": ["fine", ""]}, ValueError, r"texts\[1\] is '', of which max_tokens = 256 leaves 1 tokens"),
        ({"max_tokens": 1}, ValueError, r"texts\[0\] .* raise max_tokens"),
        ({"adapter": "lara"}, KeyError, "no finetune 'lara'; there are: lora"),
    ],
)
def test_what_cannot_be_measured_is_said(model, tiny_tokenizer, changes, error, message):
    with pytest.raises(error, match=message):
        measure_forgetting(model, tiny_tokenizer, **({"texts": TEXTS, "adapter": "lora"} | changes))


def test_a_model_in_training_is_measured_without_dropout_and_goes_on_training(
    model, tiny_tokenizer, randomise
):
    model.bank.add("dropping", LoraConfig(rank=4, dropout=0.5))
    randomise(model.bank, "dropping")
    wanted = measure_forgetting(model, tiny_tokenizer, TEXTS, "dropping")
    model.train()
    model.language_model.lm_head.eval()
    modes = [module.training for module in model.modules()]
    assert True in modes, "nothing was in training, so there is no mode to come back to"
    assert False in modes, "a mixture shows that every module gets its own mode back"
    assert measure_forgetting(model, tiny_tokenizer, TEXTS, "dropping") == wanted
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(KeyError):
        measure_forgetting(model, tiny_tokenizer, TEXTS, "nobody")
    assert [module.training for module in model.modules()] == modes


def test_a_diverged_finetune_leaves_the_bases_numbers(model, tiny_tokenizer, poison):
    wanted = measure_forgetting(model, tiny_tokenizer, TEXTS, "lora")
    poison(model.bank, "lora")
    found = measure_forgetting(model, tiny_tokenizer, TEXTS, "lora")
    assert found.base_perplexity == wanted.base_perplexity
    assert math.isnan(found.perplexity)
    assert math.isnan(found.divergence)


@pytest.mark.parametrize("watched", [True, False])
def test_it_says_how_far_it_is(model, tiny_tokenizer, monkeypatch, capsys, watched):
    monkeypatch.setattr("sys.stderr.isatty", lambda: watched)
    measure_forgetting(model, tiny_tokenizer, TEXTS, None, batch_size=1)
    told = capsys.readouterr().err
    assert "forgetting of the base" in told
    assert (f"{len(TEXTS)}/{len(TEXTS)}" in told) == watched
    assert (f"reading {len(TEXTS)} batches" in told) == (not watched)


def test_it_reads_well(model, tiny_tokenizer):
    found = measure_forgetting(model, tiny_tokenizer, TEXTS, "lora")
    assert str(found).startswith(f"perplexity {found.base_perplexity:.3f} -> {found.perplexity:.3f} on ")


ADAPTERS = {
    "lora": LoraConfig(rank=2),
    "inputs": HybridConfig([PromptConfig(), PrefixConfig()]),
    "nested": HybridConfig([BottleneckConfig(width=2), LoraConfig(rank=2, target_modules="all-linear")]),
}


@pytest.mark.parametrize("quantization", [None, "nf4", "int8"])
def test_the_hash_is_the_bases_alone(make_model, randomise, tiny_tokenizer, quantization):
    model = make_model(quantization=quantization)
    before = base_hash(model)
    assert before == base_hash(make_model(quantization=quantization))
    for name, config in ADAPTERS.items():
        model.bank.add(name, config)
        randomise(model.bank, name)
        assert base_hash(model) == before, name
    with torch.no_grad():
        model.projector.weight += 1
    measure_forgetting(
        model, tiny_tokenizer, TEXTS, "nested"
    )  # bitsandbytes moves things at the first forward
    assert base_hash(model) == before


@pytest.mark.parametrize("quantization", [None, "nf4", "int8"])
def test_the_hash_is_that_which_runs_have_recorded(make_model, quantization):
    """Of every module's own tensors, whatever a state dict makes of them, under the names of the plain base."""
    model, plain = make_model(quantization=quantization), make_model(quantization=quantization)
    for name, config in ADAPTERS.items():
        model.bank.add(name, config)
    tensors = {}
    for path, module in plain.language_model.named_modules():
        module._save_to_state_dict(tensors, f"{path}." if path else "", keep_vars=False)
    tensors = {f"language.{name}": tensor for name, tensor in tensors.items()}
    tensors |= {f"vision.{name}": tensor for name, tensor in plain.vision_encoder.state_dict().items()}
    assert base_hash(model) == hash_tensors(tensors)


def frozen_tensors(model):
    """Every kind of tensor that makes up the base, and where it is."""
    layer = model.language_model.model.layers[1]
    tensors = {
        "embedding": model.language_model.model.embed_tokens.weight,
        "head": model.language_model.lm_head.weight,
        "norm": layer.input_layernorm.weight,
        "adapted": layer.self_attn.q_proj.weight,
        "in an adapted feed-forward": layer.mlp.down_proj.weight,
        "vision": next(model.vision_encoder.parameters()),
    }
    weight = tensors["adapted"]
    if (state := getattr(weight, "quant_state", None)) is not None:
        tensors |= {
            "codes of scales": state.absmax,
            "scales of scales": state.state2.absmax,
            "code": state.code,
        }
    elif weight.dtype == torch.int8:
        tensors["scales"] = weight.SCB
    return tensors


@pytest.mark.parametrize("quantization", [None, "nf4", "int8"])
def test_the_hash_sees_every_number_of_the_base(make_model, quantization):
    model = make_model(quantization=quantization)
    model.bank.add("nested", ADAPTERS["nested"])
    hashes = [base_hash(model)]
    for name, tensor in frozen_tensors(model).items():
        with torch.no_grad():
            number = tensor.data.view(-1)[-1:]
            number.copy_(number + 1)
        hashes.append(base_hash(model))
        assert len(set(hashes)) == len(hashes), name


def test_the_hash_sees_the_running_statistics_of_an_encoder(make_model):
    model = make_model()
    model.vision_encoder.model.register_buffer("running_mean", torch.zeros(3))
    before = base_hash(model)
    model.vision_encoder.model.running_mean[1] = 1e-6
    assert base_hash(model) != before

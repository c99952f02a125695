"""What an adapter file tells by its fields and keys, as PEFT and other trainers write them; more of it, slowly, in
test_adapter_variants.py."""

import json
from functools import partial

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from mmpeft.adapters import (
    AdapterBank,
    BitFitConfig,
    BottleneckConfig,
    DoraConfig,
    FullConfig,
    HybridConfig,
    IA3Config,
    LoraConfig,
    PromptConfig,
)
from mmpeft.adapters.merge import merge
from mmpeft.adapters.peft_format import load_adapter, save_adapter
from mmpeft.errors import RefusedError
from mmpeft.tools.tiny_models import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
TWO = ["q_proj", "up_proj"]
FIELDS = {
    "exclude_modules": {
        "target_modules": "all-linear",
        "exclude_modules": ["v_proj", "layers.0.mlp.up_proj"],
    },
    "exclude_modules by pattern": {"target_modules": TWO, "exclude_modules": r".*\.0\..*"},
    "layers_to_transform": {"target_modules": TWO, "layers_to_transform": [1], "layers_pattern": "layers"},
    "rank_pattern": {"target_modules": TWO, "rank_pattern": {"q_proj": 7, r".*\.1\.mlp.up_proj": 1}},
    "alpha_pattern": {"target_modules": TWO, "alpha_pattern": {"up_proj": 3}},
    "head and embedding": {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
    "names of nothing": {"target_modules": [*TWO, "query_key_value"]},
}


def written(model, folder, **fields):
    """Writes PEFT's file of a LoRA, and returns PEFT's model."""
    torch.manual_seed(0)
    theirs = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 6} | fields)).eval()
    for parameter in (p for p in theirs.parameters() if p.requires_grad):
        parameter.data += 0.2 * torch.randn_like(parameter)
    theirs.save_pretrained(folder)
    return theirs


def rename(folder, change, pickled=False):
    """The same tensors under ``change`` of their keys."""
    path = folder / "adapter_model.safetensors"
    tensors = {change(key): tensor for key, tensor in load_file(path).items()}
    path.unlink()
    torch.save(tensors, path.with_suffix(".bin")) if pickled else save_file(tensors, path)


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_fields_that_choose_layers_ranks_and_alphas_are_read_and_written(
    fields, make_llama, logits_of, tokens, tmp_path
):
    """One slot of several ranks and scalings beside others, from PEFT's file, and from ours in PEFT again."""
    theirs = written(make_llama(), tmp_path / "theirs", **fields)
    bank, ids = AdapterBank(make_llama()), tokens(3)
    bank.add("other", LoraConfig(rank=3))
    load_adapter(bank, "a", tmp_path / "theirs")
    with torch.no_grad():
        want = theirs(ids).logits
    got = logits_of(bank, ["a", None, "a"], ids)
    torch.testing.assert_close(got[[0, 2]], want[[0, 2]], **CLOSE)
    assert not torch.allclose(got[1], want[1], atol=1e-2)

    save_adapter(bank, "a", tmp_path / "ours", "tiny")
    with torch.no_grad():
        again = peft.PeftModel.from_pretrained(make_llama(), tmp_path / "ours")(ids).logits
    torch.testing.assert_close(again, want, **CLOSE)


def test_feed_forwards_are_those_that_peft_takes_for_such(logits_of, tokens, tmp_path):
    """To PEFT the name v_proj means a qkv_proj too, and its vector is one of inputs then."""
    torch.manual_seed(0)
    feedforwards = ["v_proj", "down_proj"]
    fields = {"target_modules": ["qkv_proj", *feedforwards], "feedforward_modules": feedforwards}
    theirs = peft.get_peft_model(tiny_model("phi3"), peft.IA3Config(**fields)).eval()
    for parameter in (p for p in theirs.parameters() if p.requires_grad):
        parameter.data += 0.2 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path)
    bank, ids = AdapterBank(tiny_model("phi3")), tokens(2)
    load_adapter(bank, "a", tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(bank, ["a", "a"], ids), theirs(ids).logits, **CLOSE)


@pytest.mark.parametrize(
    ("change", "pickled"),
    [
        (lambda key: key, True),
        (lambda key: key.replace(".weight", ".default.weight"), False),
        (lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."), False),
    ],
    ids=["bin", "default", "compiled"],
)
def test_other_ways_to_write_the_tensors_are_read(change, pickled, make_llama, logits_of, tokens, tmp_path):
    theirs, ids = written(make_llama(), tmp_path, target_modules=TWO, use_dora=True), tokens(2)
    rename(tmp_path, change, pickled)
    bank = AdapterBank(make_llama())
    load_adapter(bank, "a", tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(bank, ["a"] * 2, ids), theirs(ids).logits, **CLOSE)


@pytest.mark.parametrize(
    ("inner", "ours"),
    [
        ("model.language_model.", "model."),
        ("language_model.model.", "model."),
        ("model.text_model.", "model."),
    ],
)
def test_keys_of_a_multimodal_class_are_read_on_its_language_model_aloud(
    inner, ours, make_llama, logits_of, tokens, tmp_path
):
    pattern = rf"{inner}layers\..*\.(q_proj|up_proj)"
    theirs, ids = (
        written(make_llama(), tmp_path, target_modules=TWO, rank_pattern={"layers.1.mlp.up_proj": 2}),
        tokens(2),
    )
    rename(tmp_path, lambda key: key.replace(f"base_model.model.{ours}", f"base_model.model.{inner}"))
    path = tmp_path / "adapter_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"target_modules": pattern.replace(".", r"\.", 1)})
    )
    bank = AdapterBank(make_llama())
    with pytest.warns(UserWarning, match=r"keys are those of a multimodal model; .*language_|text_"):
        load_adapter(bank, "a", tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(bank, ["a"] * 2, ids), theirs(ids).logits, **CLOSE)


BESIDE = {
    "modules_to_save": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "norms": {"modules_to_save": ["input_layernorm", "model.norm"]},
    "bias": {"bias": "all"},
    "lora_bias": {"lora_bias": True},
    "trainable_token_indices": {"trainable_token_indices": [*range(0, 128, 3)]},
}


@pytest.mark.parametrize("fields", BESIDE.values(), ids=BESIDE)
@pytest.mark.parametrize("tied", [False, True], ids=["free", "tied"])
def test_what_is_trained_beside_the_method_is_of_one_slot(
    fields, tied, make_llama, logits_of, tokens, tmp_path
):
    """Rows of such a finetune share a batch with others and the base; it comes back from our files."""
    build = partial(make_llama, attention_bias=True, mlp_bias=True, tie_word_embeddings=tied)
    theirs = written(build(), tmp_path / "theirs", target_modules=TWO, **fields)
    bank, ids = AdapterBank(build()), tokens(3)
    for method in ("lora", "token_rows"):
        bank.reserve(method, 2, 60)  # padding, beside the tokens of the file
    load_adapter(bank, "a", tmp_path / "theirs")
    bank.add("b", LoraConfig(target_modules=["lm_head", "embed_tokens"]))
    got = logits_of(bank, ["a", None, "b"], ids)
    with torch.no_grad():
        torch.testing.assert_close(got[0], theirs(ids[:1]).logits[0], **CLOSE)
        assert torch.equal(got[1:], build()(ids).logits[1:])
    save_adapter(bank, "a", tmp_path / "ours", "tiny")
    again = AdapterBank(build())
    load_adapter(again, "a", tmp_path / "ours")
    torch.testing.assert_close(logits_of(again, ["a"] * 3, ids)[0], got[0], **CLOSE)


def test_a_base_that_was_trained_is_told_by_its_tied_weight(make_llama, logits_of, tokens, tmp_path):
    """Without modules_to_save the file holds the base's own embedding, which the head shares."""
    theirs = written(make_llama(tie_word_embeddings=True), tmp_path, target_modules=TWO)
    embedding = theirs.get_input_embeddings().weight
    embedding.data += 0.1 * torch.randn_like(embedding)
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    path = tmp_path / "adapter_model.safetensors"
    save_file({key: t for key, t in load_file(path).items() if "lm_head" not in key}, path)
    bank, ids = AdapterBank(make_llama(tie_word_embeddings=True)), tokens(2)
    load_adapter(bank, "a", tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(bank, ["a"] * 2, ids), theirs(ids).logits, **CLOSE)


@pytest.mark.parametrize("tied", [False, True], ids=["free", "tied"])
def test_dora_on_the_embedding_goes_both_ways_and_merges(tied, make_llama, logits_of, tokens, tmp_path):
    build, ids = partial(make_llama, tie_word_embeddings=tied), tokens(3)
    theirs = written(build(), tmp_path / "theirs", target_modules=["q_proj", "embed_tokens"], use_dora=True)
    bank = AdapterBank(build())
    load_adapter(bank, "a", tmp_path / "theirs")
    got = logits_of(bank, ["a", None, "a"], ids)
    save_adapter(bank, "a", tmp_path / "ours", "tiny")
    ours = peft.PeftModel.from_pretrained(build(), tmp_path / "ours").eval()
    with torch.no_grad():
        torch.testing.assert_close(got[[0, 2]], theirs(ids).logits[[0, 2]], **CLOSE)
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
        assert torch.equal(got[1], build()(ids).logits[1])
    if not tied:
        merge(bank, "a")
        torch.testing.assert_close(logits_of(bank, [None] * 3, ids)[[0, 2]], got[[0, 2]], **CLOSE)


def test_a_resized_vocabulary_is_refused_by_name(make_llama, tmp_path):
    model = make_llama()
    model.resize_token_embeddings(131)
    written(model, tmp_path / "resized", target_modules=TWO, modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match=r"lm_head\.weight .* call resize_token_embeddings\(131\)"):
        load_adapter(AdapterBank(make_llama()), "a", tmp_path / "resized")


class GatedNorm(LlamaRMSNorm):
    def forward(self, hidden_states, gate):
        return super().forward(hidden_states) * gate


class SquaredNorm(LlamaRMSNorm):
    def forward(self, hidden_states):
        return super().forward(hidden_states) * self.weight


@pytest.mark.parametrize(
    ("norm", "why"),
    [
        (GatedNorm, "a GatedNorm, which reads more than its input"),
        (SquaredNorm, "a SquaredNorm, which is not linear in its weight"),
    ],
)
def test_a_retrained_norm_of_another_formula_is_refused(norm, why, make_llama, tmp_path):
    written(make_llama(), tmp_path, target_modules=TWO, modules_to_save=["model.norm"])
    model = make_llama()
    model.model.norm = norm(64)
    bank = AdapterBank(model)
    with pytest.raises(RefusedError, match=rf"model\.norm is {why}"):
        load_adapter(bank, "a", tmp_path)
    assert not bank.layers


UNTRAINED = {
    "lora": LoraConfig(rank=2),
    "orthogonal": LoraConfig(rank=2, start="orthogonal"),
    "dora": DoraConfig(rank=2),
    "ia3": IA3Config(),
    "bitfit": BitFitConfig(),
    "full": FullConfig(["v_proj"]),
    "bottleneck": BottleneckConfig(width=3),
    "hybrid": HybridConfig([LoraConfig(rank=2), IA3Config()]),
}


@pytest.mark.parametrize("config", UNTRAINED.values(), ids=UNTRAINED)
def test_a_file_that_changes_nothing_is_refused(config, make_bank, make_llama, randomise, tmp_path):
    """PEFT and vLLM serve it as the base; one trained tensor is enough to be a finetune."""
    bank = make_bank({"a": config}, fill=False)
    save_adapter(bank, "a", tmp_path / "fresh", "tiny")
    with pytest.raises(ValueError, match="its tensors change nothing"):
        load_adapter(AdapterBank(make_llama()), "a", tmp_path / "fresh")
    _, stack, slot = list(bank.places("a"))[-1]
    stack.fill(slot, {key: tensor + 0.01 for key, tensor in stack.tensors(slot).items()})
    save_adapter(bank, "a", tmp_path / "trained", "tiny")
    load_adapter(AdapterBank(make_llama()), "a", tmp_path / "trained")


def test_a_file_of_no_scaling_anywhere_changes_nothing(make_llama, tmp_path):
    alphas = {"lora_alpha": 0, "target_modules": ["q_proj", "v_proj"]}
    written(make_llama(), tmp_path / "none", alpha_pattern={"q_proj": 0}, **alphas)
    with pytest.raises(ValueError, match="its tensors change nothing"):
        load_adapter(AdapterBank(make_llama()), "a", tmp_path / "none")
    written(make_llama(), tmp_path / "one", alpha_pattern={"q_proj": 1}, **alphas)
    load_adapter(AdapterBank(make_llama()), "a", tmp_path / "one")


def test_virtual_tokens_are_refused_where_nobody_reads_them(make_llama, tmp_path):
    """On a plain language model they would load, route and answer as the base."""
    theirs = peft.get_peft_model(
        make_llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    theirs.save_pretrained(tmp_path)
    bank = AdapterBank(make_llama())
    with pytest.raises(ValueError, match=r"peft_type PROMPT_TUNING.*MultimodalModel"):
        load_adapter(bank, "a", tmp_path)
    bank.add("b", PromptConfig(3))
    with pytest.raises(ValueError, match="would be those of the base"):
        bank.route(["b"])

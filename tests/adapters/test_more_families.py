"""Roles of families beyond the usual names: proven by what a change of the claimed features does to tiny models.

One family for each way of naming or fusing: latent attention, hybrids, encoders' names, towers beside the decoder.
"""

import pytest
import torch

from mmpeft.adapters import AdapterBank, BottleneckConfig, IA3Config, LoraConfig
from mmpeft.adapters.architecture import find_blocks, find_layers, find_parts
from mmpeft.adapters.blocks import linear_features
from mmpeft.errors import RefusedError
from mmpeft.tools.tiny_models import tiny_model
from tests.adapters.test_architecture_roles import inputs_of, scale

NAMED = {
    "bert": ("attention.self.query", "attention.self.value", "output.dense"),
    "git": ("attention.self.query", "attention.self.value", "output.dense"),
    "ctrl": ("multi_head_attention.Wq", "multi_head_attention.Wv", "ffn.2"),
    "cpmant": ("self_att.self_attention.project_q", "self_att.self_attention.project_v", "ffn.ffn.w_out"),
    "gptj": ("attn.q_proj", "attn.v_proj", "mlp.fc_out"),
    "gpt_neo": ("attn.attention.q_proj", "attn.attention.v_proj", "mlp.c_proj"),
    "gpt_bigcode": ("attn.c_attn", "attn.c_attn", "mlp.c_proj"),
    "openai-gpt": ("attn.c_attn", "attn.c_attn", "mlp.c_proj"),
    "mpt": ("attn.Wqkv", "attn.Wqkv", "ffn.down_proj"),
    "persimmon": ("self_attn.query_key_value", "self_attn.query_key_value", "mlp.dense_4h_to_h"),
    "gpt_neox_japanese": ("attention.query_key_value", "attention.query_key_value", "mlp.dense_4h_to_h"),
    "modernbert-decoder": ("attn.q_proj", "attn.v_proj", "mlp.Wo"),
    "moshi": ("self_attn.q_proj.linear", "self_attn.v_proj.linear", "mlp.fc2"),
    "minicpm3": ("self_attn.q_b_proj", "self_attn.kv_b_proj", "mlp.down_proj"),
    "phi4_multimodal": ("self_attn.qkv_proj", "self_attn.qkv_proj", "mlp.down_proj"),
    "gemma3_text": ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"),
}
"""Family -> where q, v and down are inside a block."""
each_named = pytest.mark.parametrize("family", NAMED)


@pytest.fixture(scope="module")
def model(family):
    return build(family)


@torch.no_grad()
def build(family, **changes):
    """Biases are random too, since they belong to the features."""
    model = tiny_model(family, **changes).requires_grad_(False)
    for module in model.modules():
        if linear_features(module) and module.bias is not None:
            module.bias.normal_(std=0.1)
    return model


def run(model):
    ids = torch.randint(5, 60, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(ids).logits


def paths(model, role):
    return {part.path for part in find_parts(model, [role])}


@each_named
def test_queries_values_and_the_last_linear_are_where_the_family_has_them(family):
    model = build(family)
    for role, name in zip(("q", "v", "down"), NAMED[family], strict=True):
        assert paths(model, role) == {f"{layer}.{name}" for layer in find_layers(model)}


@each_named
def test_the_claimed_features_act_as_their_role(family):
    model = build(family)
    before = run(model)
    scale(model, "k", -1.0)
    assert not torch.equal(run(model), before)
    scale(model, "q", -1.0)
    torch.testing.assert_close(run(model), before, rtol=1e-4, atol=1e-5)
    read = inputs_of(model, "down")[0]
    if "gate" in {part.role for part in find_parts(model)}:
        scale(model, "up", 2.0)
        torch.testing.assert_close(inputs_of(model, "down")[0], 2 * read, rtol=1e-4, atol=1e-5)
    scale(model, "up", 0.0)
    scale(model, "v", 0.0)
    for role in ("o", "down"):
        assert all(torch.equal(x, torch.zeros_like(x)) for x in inputs_of(model, role))


@pytest.mark.parametrize("family", [*NAMED, "mamba2", "zamba", "recurrent_gemma", "nemotron_h", "qwen3_next"])
def test_lora_by_default_changes_its_row_and_no_other(family, randomise):
    model = build(family)
    before = run(model)
    bank = AdapterBank(model)
    bank.add("a", LoraConfig(rank=2, alpha=2))
    bank.route([None, None])
    assert torch.equal(run(model), before)
    randomise(bank, "a")
    bank.route(["a", None])
    after = run(model)
    assert torch.equal(after[1], before[1])
    assert not torch.allclose(after[0], before[0])


@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        ("jamba", ("mamba.in_proj", "self_attn.q_proj")),
        ("bamba", ("mamba.in_proj", "self_attn.q_proj")),
        ("lfm2", ("conv.in_proj", "self_attn.q_proj")),
        ("lfm2_moe", ("conv.in_proj", "self_attn.q_proj")),
        ("recurrent_gemma", ("temporal_block.linear_x", "temporal_block.q_proj")),
    ],
)
def test_blocks_that_mix_tokens_otherwise_get_lora_at_their_input(family, kinds):
    model = build(family)
    found = {path.split(".", 3)[3] for path in paths(model, "q")}
    assert found == set(kinds)
    assert {block.attention is None for block in find_blocks(model)} == {True, False}


def test_ia3_leaves_blocks_without_attention_their_feed_forward_alone():
    bank = AdapterBank(build("bamba"))
    sites = bank.add("a", IA3Config()).sites
    assert sum(path.endswith("down_proj") for path in sites) == 4
    assert sum(path.endswith("k_proj") for path in sites) == 2
    assert not any("mamba" in path for path in sites)


def test_latent_keys_are_the_heads_own_features_and_the_shared_rotated_ones():
    """kv_b_proj writes 16 key and 16 value features a head, kv_a_proj_with_mqa a latent of 16 and 8 rotated keys."""
    model = build("minicpm3")
    parts = {part.path.rsplit(".", 1)[-1]: part.features for part in find_parts(model, ["k"])}
    wanted = {
        "kv_a_proj_with_mqa": torch.arange(16, 24),
        "kv_b_proj": torch.tensor([32 * head + n for head in range(4) for n in range(16)]),
    }
    torch.testing.assert_close(parts, wanted)


def test_layers_of_a_model_of_towers_are_the_text_decoders():
    """Of Git's two lists, and a BERT's that begins behind its embeddings, only those that read text."""
    assert all(layer.startswith("git.encoder.layer.") for layer in find_layers(build("git")))


@pytest.mark.parametrize(
    ("family", "config", "words"),
    [
        ("mamba2", IA3Config(), "Mamba2ForCausalLM.*target_modules"),
        ("rwkv", LoraConfig(), r"RwkvForCausalLM.*rwkv.blocks.0.*q, v.*attention.receptance.*target_modules"),
        ("mllama", LoraConfig(), r"model.layers.3 has no self-attention \(cross_attn\)"),
        ("bart", LoraConfig(), r"model.decoder.layers.0 has several.*\(encoder_attn, self_attn\)"),
        ("xlnet", LoraConfig(), "XLNetLMHeadModel: no linear of transformer.layer.0.*q, v"),
        ("xlnet", BottleneckConfig(), r"XLNetLMHeadModel hands its layers \(tokens, rows, features\)"),
        ("reformer", LoraConfig(), "ReformerModelWithLMHead has reversible layers"),
        ("mamba", BottleneckConfig(), "MambaForCausalLM: no feed-forward.*backbone.layers.0"),
    ],
)
def test_what_a_family_does_not_have_is_refused_by_name(family, config, words):
    with pytest.raises(RefusedError, match=words):
        AdapterBank(build(family)).add("a", config)

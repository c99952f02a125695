"""Which linear plays which role: proven by what a change of the claimed features does to the model.

Every family is a random model of two layers and width 32. Nothing here trusts a name: scaling k up and q down must
leave the logits alone, zeroing v must silence the attention, and so on.
"""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from mmpeft.adapters import AdapterBank, BitFitConfig, IA3Config, LoraConfig
from mmpeft.adapters.architecture import find_blocks, find_layers, find_parts
from mmpeft.adapters.blocks import linear_features

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GATED = SIZES | {"intermediate_size": 48, "num_key_value_heads": 2}
GEMMA = GATED | {"head_dim": 8, "query_pre_attn_scalar": 8}
FALCON = SIZES | {"ffn_hidden_size": 48}
SEVEN = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}

FAMILIES = {
    "llama": ("llama", GATED, SEVEN),
    "smollm": ("llama", GATED | {"tie_word_embeddings": True}, SEVEN),
    "smollm3": ("smollm3", GATED | {"pad_token_id": 0}, SEVEN),
    "mistral": ("mistral", GATED, SEVEN),
    "qwen2": ("qwen2", GATED, SEVEN),
    "qwen3": ("qwen3", GATED | {"head_dim": 16}, SEVEN),
    "gemma2": ("gemma2", GEMMA, SEVEN),
    "gemma3": ("gemma3_text", GEMMA, SEVEN),
    "phi3": ("phi3", GATED | {"pad_token_id": 0}, {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
    "phi": (
        "phi",
        SIZES | {"intermediate_size": 48, "num_key_value_heads": 2},
        {"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"},
    ),
    "gpt2": ("gpt2", SIZES | {"n_inner": 48}, {"c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"}),
    "gpt_neox": (
        "gpt_neox",
        SIZES | {"intermediate_size": 48},
        {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    ),
    "opt": (
        "opt",
        SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 16, "max_position_embeddings": 32},
        {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
    ),
    "falcon-7b": ("falcon", FALCON | {"multi_query": True, "new_decoder_architecture": False}, None),
    "falcon-40b": (
        "falcon",
        FALCON | {"num_kv_heads": 2, "new_decoder_architecture": True},
        None,
    ),
    "falcon-rw": (
        "falcon",
        FALCON | {"multi_query": False, "new_decoder_architecture": False, "alibi": True, "bias": True},
        None,
    ),
    "bloom": ("bloom", {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}, None),
}
NEOX_NAMES = {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
QUERY_KEY_NORM = {"qwen3", "gemma3"}
"""Families that normalise queries and keys, where a factor on either changes nothing."""

each_family = pytest.mark.parametrize("family", FAMILIES)


def build(family: str) -> nn.Module:
    """The family's random model in eval mode; biases are random too, since they belong to the features."""
    kind, settings, _ = FAMILIES[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = CONFIG_MAPPING[kind](**settings)
        config._attn_implementation = "eager"
        model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
        for module in model.modules():
            if linear_features(module):
                module.weight.normal_(std=0.3)
                if module.bias is not None:
                    module.bias.normal_(std=0.3)
    return model


def scale(model: nn.Module, roles: str, factor: float) -> None:
    """Multiplies the output features that belong to the roles, and nothing else."""
    for part in find_parts(model, roles.split()):
        module = model.get_submodule(part.path)
        features = slice(None) if part.features is None else part.features
        if isinstance(module, Conv1D):
            module.weight[:, features] *= factor
        else:
            module.weight[features] *= factor
        if module.bias is not None:
            module.bias[features] *= factor


def scale_inputs(model: nn.Module, role: str, factor: float) -> None:
    for part in find_parts(model, [role]):
        model.get_submodule(part.path).weight.mul_(factor)


def run(model: nn.Module) -> torch.Tensor:
    ids = torch.randint(64, (2, 7), generator=torch.Generator().manual_seed(1))
    return model(ids).logits


def inputs_of(model: nn.Module, role: str) -> list[torch.Tensor]:
    """What the linears of a role read during one forward."""
    seen: list[torch.Tensor] = []
    hooks = [
        model.get_submodule(part.path).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        for part in find_parts(model, [role])
    ]
    run(model)
    for hook in hooks:
        hook.remove()
    return seen


@each_family
def test_every_block_has_its_roles_and_modules(family):
    model = build(family)
    names = FAMILIES[family][2] or NEOX_NAMES
    blocks = find_blocks(model)
    assert [block.number for block in blocks] == [0, 1]
    assert [block.path for block in blocks] == find_layers(model)
    gated = "gate_proj" in names or "gate_up_proj" in names
    for block in blocks:
        assert sorted(part.role for part in block.parts) == sorted(
            ["q", "k", "v", "o", "up", "down", *(["gate"] if gated else [])]
        )
        paths = {part.path for part in block.parts}
        assert len(paths) == len(names)
        assert all(any(path.endswith(f".{name}") for name in names) for path in paths)
        down = next(part.path for part in block.parts if part.role == "down")
        assert down == block.feedforward or down.startswith(f"{block.feedforward}.")
        assert all(
            part.path.startswith(f"{block.attention}.")
            for part in block.parts
            if part.role in ("q", "k", "v", "o")
        )


@each_family
def test_the_parts_of_a_fused_linear_cover_it_once(family):
    model = build(family)
    fused: dict[str, list[torch.Tensor]] = {}
    for part in find_parts(model):
        if part.features is not None:
            fused.setdefault(part.path, []).append(part.features)
    for path, features in fused.items():
        wanted = torch.arange(linear_features(model.get_submodule(path))[1])
        assert torch.equal(torch.cat(features).sort().values, wanted)


@each_family
def test_scaling_keys_up_and_queries_down_changes_nothing(family):
    model = build(family)
    before = run(model)
    scale(model, "k", 2.0)
    changed = run(model)
    scale(model, "q", 0.5)
    torch.testing.assert_close(run(model), before, rtol=1e-4, atol=1e-4)
    if family not in QUERY_KEY_NORM:
        assert (changed - before).abs().max() > 1e-3


@each_family
def test_opposite_signs_of_keys_and_queries_cancel(family):
    """Unlike a factor, a sign passes the norm of queries and keys."""
    model = build(family)
    before = run(model)
    scale(model, "k", -1.0)
    assert (run(model) - before).abs().max() > 1e-3
    scale(model, "q", -1.0)
    torch.testing.assert_close(run(model), before, rtol=1e-4, atol=1e-4)


@each_family
def test_attention_reads_the_values_alone(family):
    """Its last linear reads a weighted mean of values: none without them, twice as much of twice."""
    model = build(family)
    first = inputs_of(model, "o")[0]
    scale(model, "v", 2.0)
    torch.testing.assert_close(inputs_of(model, "o")[0], 2 * first, rtol=1e-4, atol=1e-4)
    scale(model, "v", 0.0)
    assert all(torch.equal(x, torch.zeros_like(x)) for x in inputs_of(model, "o"))


@each_family
def test_scaling_values_up_and_the_output_down_changes_nothing(family):
    model = build(family)
    before = run(model)
    scale(model, "v", 2.0)
    scale_inputs(model, "o", 0.5)
    torch.testing.assert_close(run(model), before, rtol=1e-4, atol=1e-4)


@each_family
def test_the_feed_forwards_last_linear_reads_what_up_writes(family):
    model = build(family)
    first = inputs_of(model, "down")[0]
    assert first.shape[-1] == (128 if family == "bloom" else 48)
    if "gate" in {part.role for part in find_parts(model)}:
        scale(model, "up", 2.0)
        torch.testing.assert_close(inputs_of(model, "down")[0], 2 * first, rtol=1e-4, atol=1e-4)
    scale(model, "up", 0.0)
    silent = inputs_of(model, "down")
    assert all(torch.equal(x, torch.zeros_like(x)) for x in silent), "act(0) is 0 for all of these"


@each_family
def test_the_named_feed_forward_and_attention_write_what_their_last_linear_writes(family):
    """What sits behind such a module, a bottleneck say, sees the feed-forward's output."""
    model = build(family)
    written: dict[str, torch.Tensor] = {}

    def keep(path: str):
        def hook(_, __, output):
            written[path] = output[0] if isinstance(output, tuple) else output

        return hook

    pairs = []
    for block in find_blocks(model):
        for role, path in (("o", block.attention), ("down", block.feedforward)):
            last = next(part.path for part in block.parts if part.role == role)
            pairs.append((last, path))
            model.get_submodule(last).register_forward_hook(keep(last))
            if path != last:
                model.get_submodule(path).register_forward_hook(keep(path))
    run(model)
    for last, path in pairs:
        if family == "bloom":  # adds the residual inside
            continue
        torch.testing.assert_close(written[path], written[last])


@each_family
def test_roles_are_the_same_once_modules_are_wrapped(family):
    model = build(family)
    before = [(part.path, part.role) for part in find_parts(model)]
    bank = AdapterBank(model)
    bank.add("a", LoraConfig(rank=1, target_modules="all-linear"))
    assert [(part.path, part.role) for part in find_parts(bank.model)] == before


def test_an_encoder_decoder_model_is_refused():
    config = T5Config(vocab_size=64, d_model=32, d_ff=48, d_kv=8, num_layers=1, num_heads=2)
    with pytest.raises(
        ValueError, match=r"T5ForConditionalGeneration is an encoder-decoder model.*decoder-only"
    ):
        find_blocks(T5ForConditionalGeneration(config))


def test_two_towers_are_refused():
    tower = nn.ModuleList([nn.Linear(2, 2)])
    with pytest.raises(ValueError, match=r"no single list of decoder layers \(found: image, text\)"):
        find_layers(nn.ModuleDict({"image": tower, "text": nn.ModuleList([nn.Linear(2, 2)])}))
    with pytest.raises(ValueError, match="found: none"):
        find_layers(nn.Linear(2, 2))


def test_a_missing_role_names_model_role_and_linears():
    model = build("llama")
    model.model.layers[1].mlp.down_proj = nn.Identity()
    with pytest.raises(ValueError, match="no linear") as error:
        find_parts(model)
    for words in ("LlamaForCausalLM", "model.layers.1 ", "down", "self_attn.q_proj", "mlp.up_proj"):
        assert words in str(error.value)
    assert len(find_parts(model, ["q", "v"])) == 4


def test_the_feed_forward_of_a_mixture_is_its_experts_and_the_shared_one():
    """Whatever cannot change the experts is refused: its shared expert alone would be trained, without a word."""
    settings = GATED | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 2}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["qwen2_moe"](**settings))
    assert len(find_parts(model, ["q", "k", "v", "o"])) == 8
    downs = [part.path for part in find_parts(model, ["down"])]
    names = ("shared_expert.down_proj", "experts.down_proj")
    assert downs == [f"model.layers.{n}.mlp.{name}" for n in range(2) for name in names]
    with pytest.raises(ValueError, match=r"mlp.experts.* in one tensor, which bitfit cannot change"):
        AdapterBank(model).add("a", BitFitConfig())


def test_a_fused_projection_of_unknown_order_is_refused_with_the_way_out_to_those_that_split_it():
    """CodeGen cuts its qkv_proj into pieces of four devices. LoRA takes all of it, IA3 would need keys and values."""
    config = CONFIG_MAPPING["codegen"](vocab_size=64, n_embd=32, n_layer=1, n_head=4, rotary_dim=4)
    bank = AdapterBank(AutoModelForCausalLM.from_config(config))
    with pytest.raises(ValueError, match=r"'codegen'.*target_modules to \['qkv_proj'\]"):
        bank.add("a", IA3Config())
    assert bank.add("a", LoraConfig(rank=1)).sites == ["transformer.h.0.attn.qkv_proj"]


def test_cross_attention_is_refused():
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["gpt2"](**SIZES, add_cross_attention=True))
    with pytest.raises(
        ValueError, match=r"several modules that look like its attention \(attn, crossattention\)"
    ):
        find_blocks(model)


@each_family
def test_ia3_by_default_reaches_keys_values_and_feed_forward(family):
    model = build(family)
    parts = find_parts(model, ["k", "v", "down"])
    bank = AdapterBank(model)
    assert set(bank.add("a", IA3Config()).sites) == {part.path for part in parts}

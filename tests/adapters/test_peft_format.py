"""PEFT as the oracle for our numbers and our files.

Tolerances: where ``alpha / rank`` is a power of two, LoRA logits are bitwise PEFT's. Other scalings we fold
into B and PEFT multiplies into the product, and IA3 vectors we hold less one: fp32 rounding, ``CLOSE``.
"""

import json

import peft
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from mmpeft.adapters import (
    AdapterBank,
    BitFitConfig,
    BottleneckConfig,
    DoraConfig,
    FullConfig,
    HybridConfig,
    IA3Config,
    LoraConfig,
)
from mmpeft.adapters.peft_format import load_adapter, save_adapter
from tests.adapters.toy_method import ToyConfig
from tests.conftest import stack_at

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
EXACT = {"rtol": 0, "atol": 0}
BLOCK_1 = "model.layers.1."

CASES = {
    "lora": (LoraConfig(rank=8, alpha=16), EXACT),
    "lora-all-linear": (LoraConfig(rank=4, alpha=8, target_modules="all-linear"), EXACT),
    "lora-rank-1": (LoraConfig(rank=1, alpha=1, target_modules=["o_proj", "up_proj"]), EXACT),
    "lora-odd-alpha": (LoraConfig(rank=6, alpha=7), CLOSE),
    "lora-rslora": (LoraConfig(rank=6, alpha=4, rslora=True), CLOSE),
    "lora-one-layer": (LoraConfig(rank=2, alpha=2, target_modules=[f"{BLOCK_1}self_attn.q_proj"]), EXACT),
    "lora-pattern": (LoraConfig(rank=2, alpha=2, target_modules=r".*\.1\..*(gate|down)_proj"), EXACT),
    "dora": (DoraConfig(rank=4, alpha=4), CLOSE),
    "dora-all-linear": (DoraConfig(rank=3, alpha=7, target_modules="all-linear"), CLOSE),
    "ia3": (IA3Config(), CLOSE),
    "ia3-outputs": (IA3Config(["k_proj", "v_proj", "up_proj"], []), CLOSE),
    "ia3-one-layer-in": (
        IA3Config([f"model.layers.{i}.mlp.down_proj" for i in (0, 1)], [f"{BLOCK_1}mlp.down_proj"]),
        CLOSE,
    ),
}


@pytest.fixture(params=CASES)
def case(request):
    """(config, tolerance of the logits)"""
    return CASES[request.param]


def peft_config(config):
    """The same config in PEFT's terms, ready for training."""
    common = {"target_modules": config.target_modules, "inference_mode": False}
    if isinstance(config, LoraConfig):
        common |= {"target_modules": ["q_proj", "v_proj"]} if config.target_modules == "auto" else {}
        common |= {"use_dora": isinstance(config, DoraConfig), "use_rslora": config.rslora}
        return peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, **common)
    if config.target_modules == "auto":
        common["target_modules"] = ["k_proj", "v_proj", "down_proj"]
        return peft.IA3Config(feedforward_modules=["down_proj"], **common)
    return peft.IA3Config(feedforward_modules=config.feedforward_modules, **common)


def peft_gradients(model):
    return {
        key.removeprefix("base_model.model.").replace(".default", ""): p.grad
        for key, p in model.named_parameters()
        if p.requires_grad
    }


def our_gradients(bank, name):
    """The gradients in PEFT's names and shapes; d/dl is d/d(l - 1)."""
    gradients = {}
    for path in bank.entry(name).sites:
        stack = stack_at(bank, name, path)
        if isinstance(bank.entry(name).config, LoraConfig):
            gradients[f"{path}.lora_A.weight"] = stack.lora_A.grad[0]
            gradients[f"{path}.lora_B.weight"] = stack.lora_B.grad[0]
            if isinstance(bank.entry(name).config, DoraConfig):
                gradients[f"{path}.lora_magnitude_vector.weight"] = stack.magnitude.grad[0]
        else:
            grad = stack.ia3_delta.grad[0]
            gradients[f"{path}.ia3_l"] = grad[None] if stack.side == "input" else grad[:, None]
    return gradients


def test_our_files_load_in_peft_and_compute_the_same(
    case, make_llama, make_bank, logits_of, tokens, tmp_path
):
    config, tolerance = case
    bank = make_bank({"a": config})
    save_adapter(bank, "a", tmp_path, "tiny")
    theirs = peft.PeftModel.from_pretrained(make_llama(), tmp_path)
    ids = tokens(2)
    with torch.no_grad():
        want = theirs(ids).logits
    torch.testing.assert_close(logits_of(bank, ["a", "a"], ids), want, **tolerance)
    assert not torch.equal(want, logits_of(bank, [None, None], ids))


def test_on_a_bf16_base_the_error_stays_near_that_of_peft(
    case, make_llama, make_bank, logits_of, tokens, tmp_path
):
    """PEFT casts LoRA's activations up, which costs time; we cast its weights down. Even with these adapters,
    as large as the base's weights, the base's own rounding stays the larger part of the error (1.35 seen)."""
    config, _ = case
    ids = tokens(4)
    bank = make_bank({"a": config}, model=make_llama().bfloat16())
    save_adapter(bank, "a", tmp_path, "tiny")
    exact = make_bank({"a": config}, model=make_llama().bfloat16().float())
    theirs = peft.PeftModel.from_pretrained(make_llama().bfloat16(), tmp_path)
    with torch.no_grad():
        logits = {"peft": theirs(ids).logits, "ours": logits_of(bank, ["a"] * 4, ids)}
    want = logits_of(exact, ["a"] * 4, ids)
    error = {name: (got.float() - want).abs().mean() for name, got in logits.items()}
    assert 0 < error["ours"] < 1.5 * error["peft"]


def test_our_files_come_back_bit_for_bit(case, make_bank, make_llama, tmp_path):
    """LoRA's tensors exactly; IA3's vectors to the rounding of ``l - 1``, and no further on a second trip."""
    config, _ = case
    bank = make_bank({"a": config})
    save_adapter(bank, "a", tmp_path, "tiny")
    again = AdapterBank(make_llama())
    load_adapter(again, "b", tmp_path)
    assert again.entry("b").sites == bank.entry("a").sites
    assert again.tensors("b").keys() == bank.tensors("a").keys()
    for key, tensor in again.tensors("b").items():
        assert torch.equal(tensor, bank.tensors("a")[key]), key
    if isinstance(config, LoraConfig):
        assert again.entry("b").config.scaling == config.scaling


def test_peft_files_load_here_and_compute_the_same_with_the_same_gradients(
    case, make_llama, logits_of, tokens, token_means, tmp_path
):
    """Forward, and the gradient of every tensor, against PEFT training the same weights."""
    config, tolerance = case
    torch.manual_seed(0)
    theirs = peft.get_peft_model(make_llama(), peft_config(config)).eval()
    for parameter in (p for p in theirs.parameters() if p.requires_grad):
        parameter.data += 0.2 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path)
    bank = AdapterBank(make_llama())
    load_adapter(bank, "a", tmp_path)

    ids = tokens(2)
    want = theirs(ids).logits
    torch.testing.assert_close(logits_of(bank, ["a", "a"], ids), want.detach(), **tolerance)
    token_means(want, ids).sum().backward()
    token_means(bank.model(ids).logits, ids).sum().backward()
    gradients = our_gradients(bank, "a")
    assert gradients.keys() == peft_gradients(theirs).keys()
    for key, gradient in peft_gradients(theirs).items():
        assert gradient.any(), key
        torch.testing.assert_close(
            gradients[key], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_files_of_several_ranks_share_one_bank(make_llama, make_bank, logits_of, tokens, tmp_path):
    """Each row against PEFT with that one adapter; the padding to the largest rank shows nowhere."""
    configs = {name: config for name, (config, _) in CASES.items()}
    bank = make_bank(configs)
    ids = tokens(len(configs))
    mixed = logits_of(bank, list(configs), ids)
    for row, name in enumerate(configs):
        save_adapter(bank, name, tmp_path / name, "tiny")
        theirs = peft.PeftModel.from_pretrained(make_llama(), tmp_path / name)
        with torch.no_grad():
            torch.testing.assert_close(mixed[row], theirs(ids[row : row + 1]).logits[0], rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize(
    ("model_class", "model_config", "config"),
    [
        (Qwen2ForCausalLM, Qwen2Config, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])),
        (Qwen2ForCausalLM, Qwen2Config, peft.IA3Config(task_type="CAUSAL_LM")),
        (GPT2LMHeadModel, GPT2Config, peft.LoraConfig(r=4, target_modules=["c_attn"])),
        (GPT2LMHeadModel, GPT2Config, peft.IA3Config(target_modules=["c_attn", "mlp.c_proj"],
                                                     feedforward_modules=["mlp.c_proj"])),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_other_architectures_go_both_ways(
    model_class, model_config, config, logits_of, tokens, tmp_path, randomise
):
    """Biases (Qwen2: with IA3 they are scaled too) and GPT-2's transposed linears."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
    sizes |= {"bos_token_id": 0, "eos_token_id": 0}
    sizes |= {"intermediate_size": 128, "num_key_value_heads": 2} if model_config is Qwen2Config else {}

    def make():
        torch.manual_seed(0)
        model = model_class(model_config(**sizes)).eval()
        for key, parameter in model.named_parameters():
            parameter.data += 0.1 if key.endswith("bias") else 0
        return model

    torch.manual_seed(0)
    trained = peft.get_peft_model(make(), config)
    for parameter in (p for p in trained.parameters() if p.requires_grad):
        parameter.data += 0.1
    trained.save_pretrained(tmp_path / "theirs")
    bank = AdapterBank(make())
    load_adapter(bank, "a", tmp_path / "theirs")
    randomise(bank, "a")
    save_adapter(bank, "a", tmp_path / "ours", "tiny")
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "ours")
    with torch.no_grad():
        torch.testing.assert_close(logits_of(bank, ["a"], tokens(1)), theirs(tokens(1)).logits, **CLOSE)


def test_the_saved_config_is_small_and_spells_the_targets_out(make_bank, tmp_path):
    """Older PEFT refuses keys it does not know, and its default targets are not the paper's everywhere."""
    save_adapter(make_bank({"a": IA3Config()}), "a", tmp_path, "org/base")
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == {
        "peft_type": "IA3",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "target_modules": ["down_proj", "k_proj", "v_proj"],
        "feedforward_modules": ["down_proj"],
        "fan_in_fan_out": False,
        "base_model_name_or_path": "org/base",
    }


OWN = {
    "bitfit": BitFitConfig(layers=[1]),
    "bottleneck": BottleneckConfig(width=3, reads="input", scaling=2.0),
    "full": FullConfig(["o_proj"]),
    "toy": ToyConfig(layers=[1]),
    "hybrid": HybridConfig([LoraConfig(rank=2, layers=[0]), LoraConfig(rank=5, layers=[1]), IA3Config()]),
}


@pytest.mark.parametrize("name", OWN)
def test_methods_without_a_format_of_peft_come_back_from_ours(
    name, make_bank, make_llama, logits_of, tokens, tmp_path
):
    bank = make_bank({"a": OWN[name]})
    save_adapter(bank, "a", tmp_path, "tiny")
    again = make_bank({"other": LoraConfig(rank=7), "taken": BitFitConfig()}, model=make_llama())
    load_adapter(again, "b", tmp_path)
    for key, tensor in bank.tensors("a").items():
        torch.testing.assert_close(again.tensors("b")[key], tensor, **CLOSE)
    ids = tokens(2)
    torch.testing.assert_close(logits_of(again, ["b"] * 2, ids), logits_of(bank, ["a"] * 2, ids), **CLOSE)


def test_a_finetune_is_replaced_in_a_live_bank_and_the_others_keep_their_bits(
    make_bank, logits_of, tokens, tmp_path
):
    """Within the reserve not a Parameter is new; a faulty replacement leaves the old one in its place."""
    save_adapter(make_bank({"new": LoraConfig(rank=3)}), "new", tmp_path, "tiny")
    bank, ids = make_bank(reserve={"lora": (4, 8)}), tokens(3)
    names, parameters = ["small", "large", "tfew"], [id(p) for p in bank.parameters()]
    before = logits_of(bank, names, ids)
    load_adapter(bank, "small", tmp_path, replace=True)
    after = logits_of(bank, names, ids)
    assert not torch.equal(after[0], before[0])
    assert torch.equal(after[1:], before[1:])
    assert [id(p) for p in bank.parameters()] == parameters
    with pytest.raises(ValueError, match="already has an adapter"):
        load_adapter(bank, "small", tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="may be truncated"):
        load_adapter(bank, "small", tmp_path, replace=True)
    assert torch.equal(logits_of(bank, names, ids), after)

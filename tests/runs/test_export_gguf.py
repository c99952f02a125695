"""`mmpeft export --to gguf`: llama.cpp's own server answers with the file as the finetune does here."""

import shutil

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mmpeft.adapters import AdapterBank, LoraConfig
from mmpeft.adapters.adapter_file import read_file
from mmpeft.adapters.peft_format import load_adapter, save_adapter
from mmpeft.errors import RefusedError
from mmpeft.runs.adapter_gguf import write_adapter_gguf
from mmpeft.runs.export import ADAPTER_GGUF, export_run
from mmpeft.runs.manifest import read_manifest, write_manifest
from mmpeft.runs.plain_lora import PlainLora
from tests.runs.llama_cpp import LlamaCpp, greedy_here, permuted, write_base

UNEVEN = LoraConfig(
    rank=4,
    alpha=6.0,
    target_modules="all-linear",
    rank_pattern={"k_proj": 12, "layers.1.mlp.down_proj": 2},
    alpha_pattern={"q_proj": 3.0},
)
CONFIGS = {
    "uneven": UNEVEN,
    "stable": LoraConfig(rank=4, alpha=8, rslora=True, target_modules=["q_proj", "v_proj"]),
}
PROMPTS = [[5, 17, 40, 99, 120, 7, 8], [77, 30, 31], [200, 4, 90, 66]]
FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}


@pytest.fixture
def make_finetune(tiny_base, tmp_path, randomise):
    """Writes a random base of a family and a LoRA far from it."""

    def make(family, config):
        language = shutil.copytree(tiny_base / "language", tmp_path / "language")
        tokenizer = AutoTokenizer.from_pretrained(language)
        if family != "llama":
            sizes = {
                "vocab_size": len(tokenizer),
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
            }
            heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
            torch.manual_seed(0)
            settings = AutoConfig.for_model(
                family, **sizes, **heads, initializer_range=0.1, tie_word_embeddings=False
            )
            AutoModelForCausalLM.from_config(settings, dtype=torch.float32).save_pretrained(language)
        model = AutoModelForCausalLM.from_pretrained(language, dtype=torch.float32).eval()
        bank = AdapterBank(model)
        bank.add("own", config)
        randomise(bank, "own")
        save_adapter(bank, "own", tmp_path / "own", str(language))
        return language, tokenizer, tmp_path / "own"

    return make


@pytest.fixture(scope="module")
def run(make_joint, tmp_path_factory):
    return make_joint(tmp_path_factory.mktemp("gguf") / "run", CONFIGS, "stable")


def tensors_of(path):
    return {tensor.name: torch.tensor(tensor.data) for tensor in GGUFReader(path).tensors}


def test_the_file_holds_what_llama_cpp_reads(run, tmp_path):
    exported = export_run(run, "gguf", "uneven", tmp_path / "out", text_only=True)
    reader = GGUFReader(tmp_path / "out" / ADAPTER_GGUF)
    facts = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF")}
    assert facts == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "general.name": "uneven",
        "adapter.type": "lora",
        "adapter.lora.alpha": 6.0,
    }
    own, got = (
        load_file(run / "adapters" / "uneven" / "adapter_model.safetensors"),
        tensors_of(reader_path(tmp_path)),
    )
    assert len(got) == len(own) == 28
    q = own["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"]
    k = own["base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"]
    torch.testing.assert_close(
        got["blk.1.attn_q.weight.lora_b"], torch.tensor(permuted(q.numpy(), 4)) * 3.0 / 6.0
    )
    torch.testing.assert_close(got["blk.1.attn_k.weight.lora_b"], torch.tensor(permuted(k.numpy(), 2)))
    down = own["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"]
    assert torch.equal(got["blk.1.ffn_down.weight.lora_a"], down)
    assert f"llama-server --model BASE.gguf --lora {tmp_path / 'out' / ADAPTER_GGUF}" in exported.remarks[0]


def reader_path(tmp_path):
    return tmp_path / "out" / ADAPTER_GGUF


def test_images_are_refused_or_left_out_by_name(run, tmp_path):
    with pytest.raises(
        RefusedError,
        match=r"behind timm's test_vit, and no mmproj of that is written here; --text_only writes",
    ):
        export_run(run, "gguf", "uneven", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_base_is_refused(run, tmp_path):
    run = shutil.copytree(run, tmp_path / "run")
    manifest = read_manifest(run)
    manifest.identity["language"]["config"] = "another"
    write_manifest(run, manifest)
    with pytest.raises(
        RefusedError, match="has another configuration than the base that 'uneven' was trained on"
    ):
        export_run(run, "gguf", "uneven", tmp_path / "out", text_only=True)
    assert not (tmp_path / "out").exists()


def test_an_unknown_family_is_refused(make_finetune, tmp_path):
    language, _, own = make_finetune("gemma2", LoraConfig(rank=2))
    with pytest.raises(RefusedError, match="is of the family 'gemma2'; written as GGUF are LoRAs of llama, "):
        write_adapter_gguf(
            tmp_path / "a.gguf", "own", PlainLora(LoraConfig(rank=2), read_file(own)), str(language), None
        )


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CONFIGS)
def test_llama_cpp_says_the_same(make_finetune, tmp_path, family, name):
    pytest.importorskip("xllamacpp", reason="llama.cpp's server: pip install xllamacpp")
    language, tokenizer, own = make_finetune(family, CONFIGS[name])
    model = AutoModelForCausalLM.from_pretrained(language).eval()
    write_base(tmp_path / "base.gguf", model, tokenizer, FAMILIES[family])
    write_adapter_gguf(
        tmp_path / "a.gguf", "own", PlainLora(CONFIGS[name], read_file(own)), str(language), None
    )
    server = LlamaCpp(tmp_path / "base.gguf", tmp_path / "a.gguf")
    bank = AdapterBank(model)
    load_adapter(bank, "own", own)
    answers, compared = {}, 0
    for adapter in ("own", None):

        def logits(ids, adapter=adapter):
            bank.route([adapter], ids)
            return model(ids).logits

        for number, ids in enumerate(PROMPTS):
            answers[adapter, number] = greedy_here(logits, ids, 12, tokenizer.eos_token_id)
    for number, ids in enumerate(PROMPTS):
        tokens, likely = server.greedy(ids, 12)
        here, first = answers["own", number]
        assert tokens == here
        assert here != answers[None, number][0], "the adapter changes the answer"
        for token, logprob in likely.items():
            assert logprob == pytest.approx(first[token].item(), abs=1e-4)
        compared += len(likely)
    assert compared >= 10

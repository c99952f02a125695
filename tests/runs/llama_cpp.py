"""A base as llama.cpp's GGUF, written for tests, and llama.cpp's own server over it (package xllamacpp)."""

import json
from pathlib import Path

import httpx
import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, TokenType, get_tensor_name_map
from gguf.quants import quantize

BF16 = GGMLQuantizationType.BF16


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as llama.cpp's converter orders them, written with explicit indices."""
    dim = weight.shape[0] // heads
    order = [
        head * dim + half * (dim // 2) + i
        for head in range(heads)
        for i in range(dim // 2)
        for half in (0, 1)
    ]
    return weight[order]


def write_base(path: Path, model, tokenizer, architecture: str, in_bf16: bool = False) -> None:
    """A Llama- or Qwen-like model, as llama.cpp's convert_hf_to_gguf.py would write it: matrices in float32 or
    bfloat16, vectors in float32."""
    config = model.config
    arch = {name: key for key, name in MODEL_ARCH_NAMES.items()}[architecture]
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, tokenizer)
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        values = tensor.float().numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(
            key.split(".")[-2]
        )
        values = permuted(values, heads) if heads and architecture == "llama" else values
        if in_bf16 and values.ndim == 2:
            writer.add_tensor(name, quantize(values, BF16), raw_dtype=BF16)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: GGUFWriter, tokenizer) -> None:
    ids = tokenizer.get_vocab()
    special = set(tokenizer.all_special_tokens)
    tokens = sorted(ids, key=ids.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if token in special else TokenType.NORMAL for token in tokens])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(False)


class LlamaCpp:
    """llama.cpp's server in this process, on a GGUF and, if given, an adapter."""

    def __init__(self, base: Path, adapter: Path | None = None, mmproj: Path | None = None):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(base)
        params.n_ctx, params.n_parallel, params.warmup = 512, 1, False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if adapter is not None:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        if mmproj is not None:
            params.mmproj.path = str(mmproj)
        self.server = xllamacpp.Server(params)

    def greedy(self, prompt, count: int) -> tuple[list[int], dict[int, float]]:
        """Ids of the answer to the prompt (ids, or text with images), and the likeliest first ids with their
        log-probabilities, which the server leaves out where the first token is no whole character."""
        wanted = {
            "prompt": prompt,
            "n_predict": count,
            "temperature": 0.0,
            "n_probs": 10,
            "return_tokens": True,
        }
        wanted |= {"cache_prompt": False, "ignore_eos": True}
        answer = httpx.post(f"{self.server.listening_address}/completion", json=wanted, timeout=60)
        assert answer.status_code == 200, answer.text
        told = answer.json()
        first = told["completion_probabilities"][0]
        likely = {top["id"]: top["logprob"] for top in first["top_logprobs"]}
        return told["tokens"], likely if first["id"] == told["tokens"][0] else {}


@torch.no_grad()
def greedy_here(logits_of, ids: list[int], count: int, never: int) -> tuple[list[int], torch.Tensor]:
    """The same of a model here, by ``logits_of`` ((1, length) ids -> (1, length, vocabulary)); the id ``never`` is not
    chosen. The log-probabilities are those of the first place."""
    answer, first = [], None
    for _ in range(count):
        likely = logits_of(torch.tensor([ids + answer]))[0, -1].log_softmax(-1)
        first = likely if first is None else first
        answer.append(int(likely.index_fill(0, torch.tensor([never]), -torch.inf).argmax()))
    return answer, first

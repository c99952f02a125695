"""A LoRA as llama.cpp's adapter GGUF: two float32 tensors a linear, under llama.cpp's names, and one alpha.

Source: llama.cpp, ``convert_lora_to_gguf.py`` and ``src/llama-adapter.cpp``: the update is ``(alpha / rank) B A``, with
the rank of each pair of tensors.
"""

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig

from mmpeft.errors import RefusedError
from mmpeft.models.language import load_pretrained
from mmpeft.runs.gguf_file import finish_gguf
from mmpeft.runs.identity import hash_config
from mmpeft.runs.plain_lora import PlainLora

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""``model_type`` of a base -> what llama.cpp calls its architecture."""
INTERLEAVED = ("llama",)
"""Architectures whose rotary embedding turns neighbours (2i, 2i + 1), where transformers turns i and i + dim / 2: rows
of q and k are in another order."""


def write_adapter_gguf(path: Path, name: str, lora: PlainLora, base: str, config_hash: str | None) -> None:
    """Writes the file.

    Args:
        path: to write to.
        name: of the finetune.
        lora: the finetune.
        base: the language model, of which the configuration is read.
        config_hash: what the run recorded of that configuration.

    Raises:
        RefusedError: an architecture or a linear that is not known here, or a base that is not the run's.
    """
    from gguf import GGUFWriter

    config = load_pretrained(AutoConfig, base)
    if config_hash not in (None, hash_config(config)):
        raise RefusedError(
            f"{base} has another configuration than the base that {name!r} was trained on; put that back"
        )
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        raise RefusedError(
            f"{base} is of the family {config.model_type!r}; written as GGUF are LoRAs of {', '.join(ARCHITECTURES)}. "
            "For others, llama.cpp's own convert_lora_to_gguf.py may read the folder that --to transformers writes"
        )
    alpha = float(lora.config.alpha or 1.0)  # which llama.cpp takes at 0 for a scaling of 1
    tensors = _tensors(lora, config, architecture, alpha)
    writer = GGUFWriter(path, architecture)
    writer.add_type("adapter")
    writer.add_name(name)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    finish_gguf(writer, tensors)


def _tensors(lora: PlainLora, config: Any, architecture: str, alpha: float) -> dict[str, Tensor]:
    """llama.cpp's name -> tensor. What ``(alpha / rank)`` does not say of the scaling, such as rank-stabilised ones and
    other alphas of some linears, is in B."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    known = {name: key for key, name in MODEL_ARCH_NAMES.items()}
    names = get_tensor_name_map(known[architecture], config.num_hidden_layers)
    tensors: dict[str, Tensor] = {}
    for path, (A, B) in lora.updates.items():
        name = names.get_name(path)
        if name is None:
            raise RefusedError(
                f"{lora.file.weights} changes {path}, which llama.cpp's {architecture} does not have; `mmpeft merge` "
                "makes a plain model of it"
            )
        B = B.float() * (lora.config.scaling_at(path) * len(A) / alpha)
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(
            path.split(".")[-1]
        )
        if heads and architecture in INTERLEAVED:
            B = interleaved(B, heads)
        tensors |= {f"{name}.weight.lora_a": A, f"{name}.weight.lora_b": B}
    return tensors


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Rows (heads * dim, n) of q or k in llama.cpp's order: of each head the i-th of both halves side by side."""
    return rows.view(heads, 2, -1, rows.shape[-1]).transpose(1, 2).reshape(rows.shape)

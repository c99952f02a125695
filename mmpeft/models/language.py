"""The Hugging Face causal LM and its tokenizer, plain or quantised (nf4, int8): the one door of bitsandbytes."""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from mmpeft.errors import MissingFileError, RefusedError
from mmpeft.paths import LANGUAGE_MODEL, resolve


@dataclass
class LanguageConfig:
    """Which language model, and how it is held."""

    name: str = LANGUAGE_MODEL
    """Hub id, local folder, or the embedded model."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """"auto" is bfloat16 where the processor multiplies it natively, else float32."""
    quantization: Literal["nf4", "int8"] | None = None
    """"nf4" holds the base in 4-bit NormalFloat with double quantisation (QLoRA), "int8" in 8 bits."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """"auto" is eager on CPU, where SDPA with a mask is slower, and SDPA elsewhere."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward: about a third more time for a fraction of the memory."""


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a language model."""
    return AutoTokenizer.from_pretrained(existing_path(name))


def load_language_model(config: LanguageConfig, device: torch.device | str = "cpu") -> nn.Module:
    """The frozen model, in eval mode.

    Raises:
        RefusedError: the checkpoint lacks tensors (transformers would make them up at random).
        MissingFileError: no such model on this machine and no way to fetch it.
    """
    path = existing_path(config.name)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=pick_dtype(config.dtype, device),
        attn_implementation=pick_attention(config.attention, device),
        quantization_config=_quantization(config, device),
        output_loading_info=True,
        use_safetensors=True,
        device_map={"": str(device)} if config.quantization else None,
    )
    model, info = loaded
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise RefusedError(
            f"the checkpoint {path} lacks {len(missing)} tensors, such as {missing[:3]}: it is incomplete"
        )
    if config.quantization is None:
        model = model.to(device)
    _keep_gradients(model)
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model.requires_grad_(False).eval()


def pick_dtype(name: str, device: torch.device | str = "cpu") -> torch.dtype:
    """What the processor multiplies fast."""
    if name != "auto":
        return getattr(torch, name)
    if torch.device(device).type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return (
        torch.bfloat16
        if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        else torch.float32
    )


def pick_attention(name: str, device: torch.device | str = "cpu") -> str:
    """Masked SDPA is the slow part of a packed step on CPU."""
    if name != "auto":
        return name
    return "eager" if torch.device(device).type == "cpu" else "sdpa"


def existing_path(name: str) -> str:
    """A local folder's path or a hub id; a path that does not exist is not mistaken for a hub id."""
    path = resolve(name)
    if Path(path).exists() or (path.count("/") <= 1 and not path.startswith((".", "/", "~"))):
        return path
    parent = Path(path).expanduser().parent
    near = difflib.get_close_matches(
        Path(path).name, [p.name for p in parent.glob("*")] if parent.exists() else [], n=1
    )
    raise MissingFileError(
        f"language model {name!r}: no such folder" + (f"; did you mean {parent / near[0]}?" if near else "")
    )


def _quantization(config: LanguageConfig, device: torch.device | str) -> BitsAndBytesConfig | None:
    if config.quantization == "int8":
        # Above a threshold LLM.int8 takes whole columns of the batch out of the 8-bit product, so that one row's
        # outliers would change the others' bits; without it each token is rounded by itself.
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    if config.quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=pick_dtype(config.dtype, device),
        )
    return None


def _keep_gradients(model: Any) -> None:
    """bitsandbytes 0.50.2 repacks 4-bit weights for an inference kernel without autograd at the first forward
    in eval mode on processors with AVX512-BF16; after that, gradients through the base are silently gone."""
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False

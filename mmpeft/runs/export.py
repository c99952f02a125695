"""Exports one finetune of a run to what other programs read: llama.cpp, vLLM, transformers with peft.

::

    exported/vllm/default/
      adapter_config.json adapter_model.safetensors   the LoRA of the language model, in PEFT's format
      projector.safetensors                           of a run with images: ``weight`` (out, in) and ``bias`` (out,)
    exported/gguf/default/
      adapter.gguf                                    the same LoRA, as llama.cpp's --lora takes it
      mmproj-default.gguf                             encoder and projector, for its --mmproj
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from torch import Tensor

from mmpeft.errors import RefusedError
from mmpeft.files import save_tensors, whole_folder
from mmpeft.models.language import LanguageConfig
from mmpeft.models.vision import VisionEncoder, check_size
from mmpeft.runs.adapter_gguf import write_adapter_gguf
from mmpeft.runs.files import PROJECTOR, language_of, read_projectors, require_empty
from mmpeft.runs.identity import check_identity
from mmpeft.runs.manifest import Manifest, choose_adapter, read_manifest
from mmpeft.runs.merge import merge_run
from mmpeft.runs.mmproj_gguf import image_remark, require_mmproj, write_mmproj
from mmpeft.runs.plain_lora import (
    PlainLora,
    is_plain,
    method_of,
    read_plain_lora,
    require_blocks,
    require_plain,
)

Program = Literal["gguf", "vllm", "transformers"]
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank may be. Source: vLLM 0.33, ``vllm/config/lora.py``."""
ADAPTER_GGUF = "adapter.gguf"


@dataclass
class Exported:
    """What `export_run` wrote."""

    adapter: str
    directory: Path
    remarks: list[str]
    """How the program is given it, and what of the finetune the program does not read."""


@dataclass
class _Finetune:
    """A finetune that is a plain LoRA, as it lies in its run."""

    name: str
    lora: PlainLora
    language: LanguageConfig
    projector: dict[str, Tensor]
    """Empty for text alone."""
    manifest: Manifest
    run: str | Path


def export_run(
    run: str | Path,
    to: Program,
    adapter: str | None = None,
    output: str | Path | None = None,
    text_only: bool = False,
    square_images: bool = False,
) -> Exported:
    """Writes a finetune of a run for another program; the arguments are those of `mmpeft export`.

    Raises:
        RefusedError: the program does not take such a finetune; told before any weight of the base is read. Or what
            `merge_run` refuses. Nothing is written then.
    """
    if square_images and (to != "gguf" or text_only):
        raise RefusedError(
            f"--square_images is for --to gguf with images, and this is --to {to}{' --text_only' * text_only}; leave "
            "one of them out"
        )
    manifest = read_manifest(run)
    adapter = choose_adapter(run, manifest, adapter)
    directory = Path(output) if output is not None else Path(run) / "exported" / to / adapter
    require_empty(directory)
    config = method_of(run, adapter)
    if to == "transformers" and not is_plain(config):
        return _merged(run, adapter, directory)
    require_plain(config, adapter, {"gguf": "llama.cpp", "vllm": "vLLM", "transformers": "peft"}[to])
    projector = {} if text_only else read_projectors(run, manifest, {}).get(adapter, {})
    lora = read_plain_lora(run, manifest, adapter)
    finetune = _Finetune(adapter, lora, language_of(run, manifest), projector, manifest, run)
    write = {"gguf": partial(_to_gguf, square_images), "vllm": _to_vllm, "transformers": _to_peft}[to]
    return Exported(adapter, directory, write(finetune, directory))


def _merged(run: str | Path, adapter: str, directory: Path) -> Exported:
    merged = merge_run(run, adapter, directory)
    remark = f"a plain model, into which {adapter!r} is folded: its logits differ by {merged.difference:.2g} at most: "
    return Exported(adapter, directory, [remark + merged.verdict])


def _to_peft(finetune: _Finetune, directory: Path) -> list[str]:
    _write_folder(finetune, directory)
    base = f'AutoModelForCausalLM.from_pretrained("{finetune.language.name}")'
    return [f'PeftModel.from_pretrained({base}, "{directory}")', *_projector_remark(finetune, "peft")]


def _to_vllm(finetune: _Finetune, directory: Path) -> list[str]:
    lora = finetune.lora
    require_blocks(lora, "vLLM")
    rank = next((known for known in VLLM_RANKS if known >= lora.largest_rank), None)
    if rank is None:
        raise RefusedError(
            f"{finetune.name!r} has rank {lora.largest_rank}, and vLLM takes {VLLM_RANKS[-1]} at most; `mmpeft merge` "
            "makes a plain model of it"
        )
    _write_folder(finetune, directory)
    options = f"--enable-lora --max-lora-rank {rank} --lora-modules {finetune.name}={directory}"
    return [f"vllm serve {finetune.language.name} {options}", *_projector_remark(finetune, "vLLM")]


def _to_gguf(square_images: bool, finetune: _Finetune, directory: Path) -> list[str]:
    require_blocks(finetune.lora, "llama.cpp")
    encoder = _mmproj_encoder(finetune, square_images) if finetune.projector else None
    files, remarks = f"--lora {directory / ADAPTER_GGUF}", []
    tensors = [*finetune.lora.file.tensors.values(), *(encoder.parameters() if encoder else ())]
    with whole_folder(directory, sum(tensor.nbytes for tensor in tensors)) as unfinished:
        config = finetune.manifest.identity["language"].get("config")
        write_adapter_gguf(
            unfinished / ADAPTER_GGUF, finetune.name, finetune.lora, finetune.language.name, config
        )
        if encoder is not None:
            mmproj = f"mmproj-{finetune.name}.gguf"
            found = write_mmproj(unfinished / mmproj, finetune.name, encoder, finetune.projector)
            files, remarks = f"{files} --mmproj {directory / mmproj}", [image_remark(found)]
    return [
        f"llama-server --model BASE.gguf {files}, with {finetune.language.name} as llama.cpp's convert_hf_to_gguf.py "
        "converts it",
        *remarks,
    ]


def _mmproj_encoder(finetune: _Finetune, square_images: bool) -> VisionEncoder:
    """The run's encoder.

    Raises:
        RefusedError: llama.cpp cannot do what it does, told before its weights are read; or it is another than it was.
    """
    manifest = finetune.manifest
    if (vision := manifest.vision_config) is None:
        raise RefusedError(f"{finetune.run} has a projector and no encoder: its manifest is damaged")
    require_mmproj(check_size(vision), finetune.name, square_images)
    encoder = VisionEncoder(vision)
    check_identity(manifest, manifest.identity | {"vision": encoder.fingerprint}, finetune.run)
    return encoder


def _write_folder(finetune: _Finetune, directory: Path) -> None:
    tensors = [*finetune.lora.file.tensors.values(), *finetune.projector.values()]
    with whole_folder(directory, sum(tensor.nbytes for tensor in tensors)) as unfinished:
        finetune.lora.write(unfinished, finetune.language.name)
        if finetune.projector:
            save_tensors(finetune.projector, unfinished / PROJECTOR)


def _projector_remark(finetune: _Finetune, program: str) -> list[str]:
    if not finetune.projector:
        return []
    return [
        f"{PROJECTOR} lies beside it, which {program} does not read: it answers text, and images only where their "
        "projected features are given as embeddings of the prompt"
    ]

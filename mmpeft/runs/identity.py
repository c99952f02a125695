"""Identities (hashes) of base, encoder and tokenizer, by which a finetune recognises what it was made for."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.utils.hub import cached_file

from mmpeft.errors import RefusedError
from mmpeft.hashing import differences, hash_json, hash_tensors, hash_weight_files
from mmpeft.models.language import LanguageConfig, existing_path, load_pretrained
from mmpeft.models.multimodal import MultimodalModel
from mmpeft.models.vision_config import VisionConfig
from mmpeft.runs.manifest import Manifest
from mmpeft.typed_json import as_dataclass

RENAMEABLE = ("  language.name:", "  vision.name:")
"""What a model is called may change, by moving a folder for example; what it is may not."""

OF_TRANSFORM = ("fit", "max_tiles", "image_size")
"""Settings of the encoder."""


def describe(language: LanguageConfig, model: MultimodalModel, tokenizer: Any) -> dict[str, Any]:
    """The identity of a model's frozen parts."""
    vocabulary = hash_tokenizer(tokenizer)
    return {
        "language": identify(language),
        "vision": model.vision_encoder.fingerprint,
        "tokenizer": vocabulary,
    }


def check_identity(
    manifest: Manifest, found: dict[str, Any], directory: str | Path, vision: VisionConfig | None = None
) -> None:
    """Args:
        vision: the encoder's settings here, to name those that make its transform another one.

    Raises:
        RefusedError: field by field, what the run was trained with and what is here.
    """
    lines = [line for line in differences(manifest.identity, found) if not line.startswith(RENAMEABLE)]
    if (
        vision is not None
        and any(map(_is_of_transform, lines))
        and (settings := _differing(manifest, vision))
    ):
        lines = settings + [line for line in lines if not _is_of_transform(line)]
    if lines:
        raise RefusedError(f"{directory} does not belong to this base:\n" + "\n".join(lines))


def _is_of_transform(line: str) -> bool:
    return line.startswith(("  vision.transform", "  vision.tiles"))


def _differing(manifest: Manifest, vision: VisionConfig) -> list[str]:
    """The settings of the encoder that make its transform another one, in place of the transforms themselves."""
    was = as_dataclass(VisionConfig, manifest.vision, "the run's vision")
    own, here = (
        {f"model.vision.{name}": getattr(each, name) for name in OF_TRANSFORM} for each in (was, vision)
    )
    return differences(own, here)


def identify(config: LanguageConfig) -> dict[str, Any]:
    """What a finetune must agree with: the base's configuration and weights. How they are held (dtype, 4-bit) is a
    setting, not an identity: a projector of the dense base serves a QLoRA run."""
    return {
        "name": config.name,
        "config": hash_config(load_pretrained(AutoConfig, config.name)),
        "weights": hash_weight_files(_weight_files(existing_path(config.name))),
    }


def hash_config(config: Any) -> str:
    """Identity of a base's configuration, transformers' object, by what it computes."""
    settings = config.to_dict()
    for volatile in ("_name_or_path", "transformers_version", "dtype"):
        settings.pop(volatile, None)
    return hash_json(settings)


def hash_tokenizer(tokenizer: Any) -> str:
    """Identity of a tokenizer by what it makes of its vocabulary's ends and of probing texts."""
    probes = ["[INST] <Img></Img> [vqa] what color is it? [/INST] blue", "Ünïcödé 12345 \n\t emoji 🙂"]
    return hash_json(
        [
            len(tokenizer),
            tokenizer.eos_token_id,
            tokenizer.bos_token_id,
            *(tokenizer(p)["input_ids"] for p in probes),
        ]
    )


def base_hash(model: MultimodalModel) -> str:
    """Identity of the frozen base, language model and vision encoder, by every byte.

    Adapters and projectors have no part in it, nor whether there are any: equal before and after a training is the
    proof that the base stayed as it was.
    """
    language = {f"language.{name}": tensor for name, tensor in model.language_model.state_dict().items()}
    vision = {f"vision.{name}": tensor for name, tensor in model.vision_encoder.state_dict().items()}
    return hash_tensors(language | vision)


def _weight_files(path: str) -> list[Path]:
    if Path(path).is_dir():
        # also the projector beside a merged model: runs that were trained on one recorded it
        return sorted(Path(path).glob("*.safetensors"))
    index = cached_file(path, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
    if index is None:
        return [Path(str(cached_file(path, "model.safetensors")))]
    return sorted(Path(index).parent.glob("*.safetensors"))

"""The run directory: which base, encoder, template and adapters belong together. Save, load, refuse.

::

    runs/mine/
      mmpeft.json             what this run belongs to, with hashes
      adapters/<name>/        one adapter in PEFT's format
      projector.safetensors   ``<adapter or "base">.weight`` and ``.bias``
      examples/               held-out examples with the model's answers
      config.yaml metrics.csv tensorboard/ checkpoints/ report.png README.md
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mmpeft.adapters.peft_format import load_adapter, save_adapter
from mmpeft.data.template import Template
from mmpeft.fingerprint import differences, hash_json, hash_tensors
from mmpeft.models.language import LanguageConfig, identify, load_language_model, load_tokenizer
from mmpeft.models.multimodal import MultimodalModel
from mmpeft.models.projector import Projector
from mmpeft.models.vision import VisionConfig, make_encoder

MANIFEST = "mmpeft.json"
PROJECTOR = "projector.safetensors"
FORMAT = 1
RENAMEABLE = ("  language.name:", "  vision.name:")
"""What a model is called may change, by moving a folder for example; what it is may not."""


@dataclass
class Manifest:
    """The content of ``mmpeft.json``."""

    language: dict[str, Any]
    """`LanguageConfig` as it was trained with."""
    vision: dict[str, Any] | None
    """`VisionConfig` as it was trained with; None for text alone."""
    template: dict[str, Any]
    """Style and longest conversation."""
    identity: dict[str, Any]
    """Hashes of the base's config and weights, the encoder's weights and transform, and the tokenizer."""
    adapters: list[str] = field(default_factory=list)
    projector: str = ""
    """Hash of the projector's tensors."""
    base: str = ""
    """Hash of every byte of the frozen base as it was in memory when the training ended."""
    metrics: dict[str, float] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    """What was trained and what it took, in words."""
    instructions: dict[str, str | None] = field(default_factory=dict)
    """The tasks it was trained on, the most frequent first, with the instruction where a task has just one."""
    format: int = FORMAT

    @property
    def vision_config(self) -> VisionConfig | None:
        return None if self.vision is None else VisionConfig(**self.vision)

    @property
    def default_task(self) -> str | None:
        """The identifier of the task that the run saw most; None where its data had no identifiers."""
        return next(iter(self.instructions), None) or None


def build_model(
    language: LanguageConfig,
    vision: VisionConfig | None,
    device: torch.device | str = "cpu",
    own_projector: Sequence[str] = (),
) -> MultimodalModel:
    """Encoder, a fresh projector and the language model, from their configs; the adapters named in
    ``own_projector`` get one of their own, and all others share the first."""
    encoder = make_encoder(vision).to(device)
    language_model: Any = load_language_model(language, device)
    dim = language_model.get_input_embeddings().weight.shape[1]
    projector = Projector(encoder.dim, dim, 1 + len(own_projector)).to(device)
    model = MultimodalModel(encoder, projector, language_model)
    model.projector_slots = {name: slot for slot, name in enumerate(own_projector, start=1)}
    return model


def describe(language: LanguageConfig, model: MultimodalModel, tokenizer: Any) -> dict[str, Any]:
    """The identity of a model's frozen parts."""
    vocabulary = hash_tokenizer(tokenizer)
    return {
        "language": identify(language),
        "vision": model.vision_encoder.fingerprint,
        "tokenizer": vocabulary,
    }


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


def save(directory: str | Path, manifest: Manifest, model: MultimodalModel) -> None:
    """Writes the manifest, the projector and every adapter of the model."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = _projector_tensors(model)
    save_file(tensors, directory / PROJECTOR)
    manifest.projector = hash_tensors(tensors)
    manifest.adapters = model.bank.names
    for name in model.bank.names:
        save_adapter(model.bank, name, directory / "adapters" / name, manifest.language["name"])
    write_manifest(directory, manifest)


def write_manifest(directory: str | Path, manifest: Manifest) -> None:
    """Writes ``mmpeft.json``."""
    (Path(directory) / MANIFEST).write_text(json.dumps(asdict(manifest), indent=2) + "\n")


def read_manifest(directory: str | Path) -> Manifest:
    """Raises:
    ValueError: not a run directory, or one of a newer format.
    """
    path = Path(directory) / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"{directory} is no run of mmpeft: it has no {MANIFEST}. `make quickstart` makes one"
        )
    content = json.loads(path.read_text())
    if content.get("format") != FORMAT:
        raise ValueError(f"{path} has format {content.get('format')!r}; this version reads format {FORMAT}")
    return Manifest(**content)


def load(
    directory: str | Path, device: torch.device | str = "cpu", with_adapters: bool = True
) -> tuple[MultimodalModel, Template, Manifest]:
    """Rebuilds the model of a run: frozen parts from where the run took them, the rest from the directory.

    Args:
        directory: the run's.
        device: of the model.
        with_adapters: False for the base and the projector that adapters share, without a trace of adapters: beside
            a finetune, rows of the base pass through its layers too.

    Raises:
        ValueError: a frozen part is not what the run was trained with, or a file does not fit.
    """
    manifest = read_manifest(directory)
    language = LanguageConfig(**manifest.language)
    owners = projector_owners(directory, manifest) if with_adapters else []
    model = build_model(language, manifest.vision_config, device, owners)
    tokenizer = load_tokenizer(language.name)
    check_identity(manifest, describe(language, model, tokenizer), directory)
    load_trained(directory, model, None if with_adapters else {})
    template = Template(
        tokenizer,
        model.vision_encoder.num_tokens,
        manifest.template["style"],
        manifest.template["max_length"],
    )
    return model, template, manifest


def load_trained(
    directory: str | Path,
    model: MultimodalModel,
    adapters: dict[str, str] | None = None,
    projector_of: str = "base",
) -> None:
    """Loads a run's projector, and its adapters, into a model of the same base.

    Args:
        directory: the run's.
        model: to load into.
        adapters: the name that each is to have -> its name in the run; None loads all under their own.
        projector_of: adapter of the run whose own projector becomes the one that adapters share, if it has one.

    Raises:
        ValueError: a damaged or misfitting file.
    """
    directory, manifest = Path(directory), read_manifest(directory)
    tensors = _read_projector(directory, manifest)
    chosen = {name: name for name in manifest.adapters} if adapters is None else adapters
    for name, slot in {"base": 0, **model.projector_slots}.items():
        wanted = projector_of if name == "base" else chosen.get(name, name)
        owner = (
            wanted if f"{wanted}.weight" in tensors else "base"
        )  # a new finetune starts from the shared one
        prefix = f"{owner}."
        own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        model.projector.fill(own, slot)
    for name, source in chosen.items():
        load_adapter(model.bank, name, directory / "adapters" / source)


def projector_owners(directory: str | Path, manifest: Manifest) -> list[str]:
    """The adapters of a run that have a projector of their own."""
    tensors = _read_projector(Path(directory), manifest)
    return sorted({key.rpartition(".")[0] for key in tensors} - {"base"})


def _read_projector(directory: Path, manifest: Manifest) -> dict[str, torch.Tensor]:
    try:
        tensors = load_file(directory / PROJECTOR)
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"{directory / PROJECTOR} is missing or damaged ({error})") from None
    if hash_tensors(tensors) != manifest.projector:
        raise ValueError(f"{directory / PROJECTOR} is not the projector that {MANIFEST} was written for")
    return tensors


def check_identity(manifest: Manifest, found: dict[str, Any], directory: str | Path) -> None:
    """Raises:
    ValueError: field by field, what the run was trained with and what is here.
    """
    lines = [line for line in differences(manifest.identity, found) if not line.startswith(RENAMEABLE)]
    if lines:
        raise ValueError(f"{directory} does not belong to this base:\n" + "\n".join(lines))


def _projector_tensors(model: MultimodalModel) -> dict[str, torch.Tensor]:
    slots = {"base": 0, **model.projector_slots}
    return {
        f"{name}.{key}": tensor.cpu().contiguous()
        for name, slot in slots.items()
        for key, tensor in model.projector.tensors(slot).items()
    }

"""The run directory on disk: save, load, refuse.

::

    runs/mine/
      mmpeft.json             what this run belongs to, with hashes
      adapters/<name>/        one adapter in PEFT's format
      projector.safetensors   ``<adapter or "base">.weight`` and ``.bias``
      examples/               held-out examples with the model's answers
      config.yaml metrics.csv tensorboard/ checkpoints/ report.png README.md
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mmpeft.adapters.peft_format import load_adapter, save_adapter
from mmpeft.data.template import Template
from mmpeft.errors import RefusedError
from mmpeft.hashing import hash_tensors
from mmpeft.models.build import build_model
from mmpeft.models.language import LanguageConfig, load_tokenizer
from mmpeft.models.multimodal import MultimodalModel
from mmpeft.runs.identity import check_identity, describe
from mmpeft.runs.manifest import MANIFEST, Manifest, read_manifest, write_manifest

PROJECTOR = "projector.safetensors"


def save_run(directory: str | Path, manifest: Manifest, model: MultimodalModel) -> None:
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


def load_run(
    directory: str | Path, device: torch.device | str = "cpu", with_adapters: bool = True
) -> tuple[MultimodalModel, Template, Manifest]:
    """Rebuilds the model of a run: frozen parts from where the run took them, the rest from the directory.

    Args:
        directory: the run's.
        device: of the model.
        with_adapters: False for the base and the projector that adapters share, without a trace of adapters: beside
            a finetune, rows of the base pass through its layers too.

    Raises:
        RefusedError: a frozen part is not what the run was trained with, or a file does not fit.
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
        RefusedError: a damaged or misfitting file.
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
        raise RefusedError(f"{directory / PROJECTOR} is missing or damaged ({error})") from None
    if hash_tensors(tensors) != manifest.projector:
        raise RefusedError(f"{directory / PROJECTOR} is not the projector that {MANIFEST} was written for")
    return tensors


def _projector_tensors(model: MultimodalModel) -> dict[str, torch.Tensor]:
    slots = {"base": 0, **model.projector_slots}
    return {
        f"{name}.{key}": tensor.cpu().contiguous()
        for name, slot in slots.items()
        for key, tensor in model.projector.tensors(slot).items()
    }

"""The run directory on disk: save, load, refuse.

::

    runs/mine/
      mmpeft.json                    what this run belongs to, with hashes
      adapters/<name>/               one finetune: its adapter in PEFT's format, and
        projector.safetensors        its projector, ``weight`` (out, in) and ``bias`` (out,)
      projector.safetensors          the projector of rows without finetune, where none of the finetunes has the same
      examples/                      held-out examples with the model's answers
      config.yaml metrics.csv tensorboard/ checkpoints/ report.png README.md
"""

import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mmpeft.adapters.bank import AdapterBank
from mmpeft.adapters.methods.base import AdapterConfig
from mmpeft.adapters.peft_format import load_adapter, read_parts, save_adapter
from mmpeft.data.image_tokens import image_tokens
from mmpeft.data.template import Template, layout_of
from mmpeft.errors import RefusedError
from mmpeft.files import save_tensors
from mmpeft.hashing import hash_file, hash_files, hash_tensors
from mmpeft.models.build import build_model
from mmpeft.models.language import LanguageConfig, load_tokenizer
from mmpeft.models.multimodal import MultimodalModel
from mmpeft.runs.identity import check_identity, describe
from mmpeft.runs.layout import PROJECTOR as PROJECTOR
from mmpeft.runs.layout import adapter_folder as adapter_folder
from mmpeft.runs.manifest import FORMAT, MANIFEST, Manifest, read_manifest, write_manifest
from mmpeft.typed_json import as_dataclass

HERE = "."
"""The language model of a merged folder: the folder itself."""
LeftOut = dict[str, RefusedError]
"""Finetune -> why it cannot be used."""
BASE = "base"
"""Whose projector is that of rows without finetune."""
RESTORE = "put back the file that was written with it, or train it again with `mmpeft fit`"


def save_run(directory: str | Path, manifest: Manifest, model: MultimodalModel) -> None:
    """Writes the manifest and every finetune of the model: its adapter and its projector."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    manifest.adapters, manifest.format, manifest.projector = model.bank.names, FORMAT, ""
    manifest.adapter_files = {}
    for name in model.bank.names:
        folder = adapter_folder(directory, name)
        files = save_adapter(model.bank, name, folder, manifest.language["name"])
        manifest.adapter_files[name] = hash_files(files, folder)
    if manifest.vision is not None:
        slots = {BASE: 0} | {name: model.projector_slots.get(name, 0) for name in model.bank.names}
        projectors = {name: model.projector.tensors(slot) for name, slot in slots.items()}
        manifest.projectors = {name: hash_tensors(tensors) for name, tensors in projectors.items()}
        (directory / PROJECTOR).unlink(missing_ok=True)  # of an earlier run, whose base had another
        for name, path in _projector_files(directory, manifest).items():
            save_tensors(projectors[name], path)
    write_manifest(directory, manifest)


def load_run(
    directory: str | Path,
    device: torch.device | str = "cpu",
    with_adapters: bool = True,
    left_out: LeftOut | None = None,
) -> tuple[MultimodalModel, Template, Manifest]:
    """Rebuilds the model of a run: frozen parts from where the run took them, the rest from the directory.

    Args:
        directory: the run's.
        device: of the model.
        with_adapters: False for the base and the projector of its rows, without a trace of adapters: beside
            a finetune, rows of the base pass through its layers too.
        left_out: takes the finetunes whose files cannot be used; None refuses the run for one of them.

    Raises:
        RefusedError: a frozen part is not what the run was trained with, or a file does not fit.
    """
    manifest = read_manifest(directory)
    language = language_of(directory, manifest)
    manifest.language["name"] = language.name  # it may be saved into another directory
    adapters = manifest.adapters if with_adapters else []
    slots = shared_slots(read_projectors(directory, manifest, {}), adapters)
    tokenizer = load_tokenizer(language.name)
    layout = layout_of(tokenizer, manifest.template, str(directory))
    model = build_model(language, manifest.vision_config, device, slots)
    check_identity(manifest, describe(language, model, tokenizer), directory)
    load_trained(directory, model, {name: name for name in adapters}, left_out=left_out)
    template = Template(
        tokenizer, image_tokens(model.vision_encoder), layout, manifest.template["max_length"]
    )
    return model, template, manifest


def language_of(directory: str | Path, manifest: Manifest) -> LanguageConfig:
    """The language model of a run; that of a merged folder is the folder itself, wherever it was moved to."""
    config = as_dataclass(LanguageConfig, manifest.language, f"{Path(directory) / MANIFEST}, language")
    if config.name == HERE:
        return replace(config, name=str(Path(directory).resolve()))
    return manifest.located_language(config)


def load_trained(
    directory: str | Path,
    model: MultimodalModel,
    adapters: Mapping[str, str],
    projector_of: str = BASE,
    left_out: LeftOut | None = None,
) -> None:
    """Loads a run's finetunes and projectors into a model of the same base.

    Args:
        directory: the run's.
        model: to load into.
        adapters: the name that each finetune is to have -> its name in the run.
        projector_of: finetune of the run whose projector becomes that of rows without finetune.
        left_out: takes the finetunes of the run whose files cannot be used; None raises for the first.

    Raises:
        RefusedError: a damaged or misfitting file. Those of finetunes that are not asked for may be damaged.
    """
    directory, manifest = Path(directory), read_manifest(directory)
    unusable: LeftOut = {}
    projectors = read_projectors(directory, manifest, unusable)
    if projectors:
        for name, slot in {BASE: 0, **model.projector_slots}.items():
            owner = projector_of if name == BASE else adapters.get(name, name)
            if owner in unusable:
                if left_out is None or name == BASE:
                    raise unusable[owner]
                continue  # none of its rows is asked
            # a new finetune begins with the projector that rows without one use
            model.projector.fill(projectors.get(owner, projectors[BASE]), slot)
    _reserve(model.bank, [adapter_folder(directory, source) for source in adapters.values()])
    for name, source in adapters.items():
        folder = adapter_folder(directory, source)
        try:
            if source in unusable:
                raise unusable[source]
            check_files(folder, manifest.adapter_files.get(source, {}))
            load_adapter(model.bank, name, folder, untrained=True)
        except RefusedError as error:
            if left_out is None:
                raise
            left_out[source] = error


def _reserve(bank: AdapterBank, folders: Sequence[Path]) -> None:
    """Room for all that is going to be loaded: made one by one, it would be copied as often."""
    wanted: dict[str, list[AdapterConfig]] = {}
    for folder in folders:
        with suppress(RefusedError):  # which is told when it is loaded
            for config in read_parts(folder):
                wanted.setdefault(config.method, []).append(config)
    have = [part.config.method for name in bank.names for part in bank.entry(name).parts]
    for method, configs in wanted.items():
        bank.reserve(method, have.count(method) + len(configs), max(config.size for config in configs))


def tell_left_out(directory: str | Path, left_out: LeftOut, usable: Sequence[str]) -> None:
    """Says which finetunes of a run cannot be used while others can.

    Raises:
        RefusedError: none can.
    """
    if left_out and not usable:
        raise next(iter(left_out.values()))
    for name, error in left_out.items():
        print(f"{directory}: {name!r} cannot be asked, the others can: {error}", file=sys.stderr)


def check_files(folder: Path, recorded: Mapping[str, str]) -> None:
    """Raises:
    RefusedError: one of the files is not there, or not as it was written.
    """
    for name, digest in recorded.items():
        if not (folder / name).is_file():
            raise RefusedError(f"{folder / name} is missing; {RESTORE}")
        if hash_file(folder / name) != digest:
            raise RefusedError(f"{folder / name} is not the file that {MANIFEST} was written for; {RESTORE}")


def require_empty(directory: Path) -> None:
    """Raises:
    RefusedError: there is something already.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise RefusedError(f"{directory} is not an empty folder: choose another output, or remove it first")


def shared_slots(projectors: Mapping[str, Mapping[str, Tensor]], names: list[str]) -> dict[str, int]:
    """Finetune -> slot, so that finetunes with equal projectors share one; those that equal the base's have none."""
    slots: dict[str, int] = {}
    by_hash = {hash_tensors(projectors[BASE]): 0} if projectors else {}
    for name in names:
        if name in projectors:
            slot = by_hash.setdefault(hash_tensors(projectors[name]), len(by_hash))
            slots |= {name: slot} if slot else {}
    return slots


def read_projectors(
    directory: str | Path, manifest: Manifest, unusable: LeftOut
) -> dict[str, dict[str, Tensor]]:
    """Finetune, or "base" -> its projector's ``weight`` and ``bias``; empty for text alone.

    Args:
        directory: the run's.
        manifest: the run's.
        unusable: takes the finetunes whose file is missing, damaged, exchanged or not finite; they are not among the
            result.

    Raises:
        RefusedError: the projector of rows without finetune is nowhere whole.
    """
    directory = Path(directory)
    if manifest.format == 1:
        return _read_format_1(directory, manifest)
    if not manifest.projectors:
        return {}
    by_hash: dict[str, dict[str, Tensor]] = {}
    for name, path in _projector_files(directory, manifest).items():
        try:
            by_hash[manifest.projectors[name]] = read_projector(path, manifest.projectors[name])
        except RefusedError as error:
            if name == BASE:
                raise
            unusable[name] = error
    if (shared := manifest.projectors[BASE]) not in by_hash:
        raise next(error for name, error in unusable.items() if manifest.projectors[name] == shared)
    return {name: by_hash[own] for name, own in manifest.projectors.items() if name not in unusable}


def _projector_files(directory: Path, manifest: Manifest) -> dict[str, Path]:
    """Where each projector lies; that of the base only where no finetune has the same."""
    files = {name: adapter_folder(directory, name) / PROJECTOR for name in manifest.adapters}
    own = {manifest.projectors[name] for name in files}
    return files if manifest.projectors[BASE] in own else {BASE: directory / PROJECTOR, **files}


def read_projector(path: Path, wanted: str | None = None) -> dict[str, Tensor]:
    """The tensors of a projector's file, of this hash where one was recorded.

    Raises:
        RefusedError: it is missing, damaged, another, or not finite.
    """
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise RefusedError(f"{path} is missing or damaged ({error}); {RESTORE}") from None
    if wanted is not None and hash_tensors(tensors) != wanted:
        raise RefusedError(f"{path} is not the projector that {MANIFEST} was written for; {RESTORE}")
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise RefusedError(f"{path} holds NaN or infinite values: its training diverged")
    return tensors


def _read_format_1(directory: Path, manifest: Manifest) -> dict[str, dict[str, Tensor]]:
    """All projectors in one file, ``<finetune or "base">.weight``; a finetune without one uses the base's."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_projector(directory / PROJECTOR, manifest.projector).items():
        name, _, part = key.rpartition(".")
        found.setdefault(name, {})[part] = tensor
    return {name: found.get(name, found[BASE]) for name in (BASE, *manifest.adapters)}

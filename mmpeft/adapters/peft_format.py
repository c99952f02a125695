"""One adapter <-> one directory in Hugging Face PEFT's format.

``adapter_config.json`` and ``adapter_model.safetensors`` whose keys are relative to the language model, so
that plain ``PeftModel.from_pretrained`` and other servers read them. Reading is strict where PEFT only warns.

Methods that PEFT has no format for use the same two files: ``peft_type`` is ``MMPEFT_`` and the method's name, the
other fields are the config's, and a tensor's key is ``base_model.model.<path of the layer>.<name>`` as in PEFT. A
finetune of several methods is a directory with a part in each subfolder, listed in its ``adapter_config.json``.

Each method knows its own fields: `AdapterConfig.to_peft` and `from_peft`.

Source: PEFT docs, "PEFT checkpoint format"; ``peft/tuners/{lora,ia3,prompt_tuning,prefix_tuning}/config.py``.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from mmpeft.adapters.adapter_file import (
    CONFIG_FILE,
    EMBEDDING_NAMES,
    KEY_PREFIX,
    WEIGHTS_FILE,
    AdapterFile,
    fitted,
    read_fields,
    read_file,
)
from mmpeft.adapters.bank import INPUTS, NAME_PATTERN, AdapterBank
from mmpeft.adapters.blocks import last_name
from mmpeft.adapters.entry import MethodPart
from mmpeft.adapters.experts import expert_key, split_path
from mmpeft.adapters.methods.base import AdapterConfig
from mmpeft.adapters.methods.hybrid import HybridConfig
from mmpeft.adapters.methods.registry import METHODS
from mmpeft.adapters.retrained import BESIDE, split
from mmpeft.adapters.targets import require_reader
from mmpeft.errors import RefusedError
from mmpeft.files import save_tensors, write_json

NOT_SET = (None, False, "none", [], {})
MERGE = "apply it in PEFT, by merge_and_unload, and serve the model that this makes"
"""What to do with an adapter that sets a field of `AdapterConfig.peft_refused`, which changes what the tensors mean."""


def save_adapter(bank: AdapterBank, name: str, directory: str | Path, base_name: str) -> list[Path]:
    """Writes adapter ``name`` to ``directory``; ``base_name`` is recorded as its base model.

    Returns:
        The files written.
    """
    directory = Path(directory)
    parts, written = bank.entry(name).parts, list[Path]()
    if bank.entry(name).config.composed:
        folders = [f"{number}_{part.config.method}" for number, part in enumerate(parts)]
        whole = {"peft_type": HybridConfig.peft_type, "parts": folders, "base_model_name_or_path": base_name}
        write_json(directory / CONFIG_FILE, whole)
        written.append(directory / CONFIG_FILE)
    else:
        folders = ["."]
    for folder, part in zip(folders, parts, strict=True):
        inputs = bank.model_inputs() if part.config.home == "inputs" else None
        experts = [path for path in part.sites if split_path(bank.model, path)]
        modules = [path for path in part.sites if path not in experts]
        fields = part.config.to_peft(modules, lambda sites: _target_names(bank, sites), inputs)
        fields |= part.config.experts_to_peft(experts, fields) if experts else {}
        write_json(directory / folder / CONFIG_FILE, fields | {"base_model_name_or_path": base_name})
        tensors = {
            _saved_key(bank, part, path, key): tensor
            for path, stack, slot in bank.places_of(part)
            for key, tensor in stack.tensors(slot).items()
        }
        save_tensors(tensors, directory / folder / WEIGHTS_FILE)
        written += [directory / folder / file for file in (CONFIG_FILE, WEIGHTS_FILE)]
    return written


@dataclass
class ReadAdapter:
    """An adapter that fits a bank's model, and is in no slot of it yet."""

    config: AdapterConfig
    files: list[AdapterFile]
    """Of each of its parts."""


def load_adapter(
    bank: AdapterBank, name: str, directory: str | Path, replace: bool = False, untrained: bool = False
) -> None:
    """Adds the adapter in ``directory`` to the bank as ``name``.

    Args:
        replace: whether it may take the place of one that the bank has under this name.
        untrained: as of `read_adapter`.

    Raises:
        RefusedError: as `read_adapter`. The bank is unchanged then.
    """
    adapter = read_adapter(bank, directory, untrained)
    if replace and name in bank:
        bank.remove(name)
    add_adapter(bank, name, adapter)


def read_adapter(bank: AdapterBank, directory: str | Path, untrained: bool = False) -> ReadAdapter:
    """The adapter in ``directory``, for the bank's model. Others may use bank and model meanwhile.

    Args:
        untrained: whether it may change nothing, as a finetune of a run does that has trained its projector alone.

    Raises:
        RefusedError: anything but exactly the tensors that its config promises for this model, or tensors that
            change nothing.
    """
    directory = Path(directory)
    composed, folders = _folders(directory)
    files = [part for folder in folders for part in _parts(fitted(read_file(folder), bank.model), bank)]
    configs = [_config_of(file.folder, file.fields) for file in files]
    config = HybridConfig(configs) if composed or len(configs) > 1 else configs[0]
    try:
        require_reader(config.parts(), bank.image_shape)
        planned = bank.plan(config)
    except ValueError as error:
        raise RefusedError(f"{directory / CONFIG_FILE}: {error}") from None
    for file, part in zip(files, planned, strict=True):
        _check_tensors(file, _shapes(bank, part))
    if not untrained and all(
        _changes_nothing(bank, part, file) for file, part in zip(files, planned, strict=True)
    ):
        raise RefusedError(
            f"{files[0].weights}: its tensors change nothing, so that its rows would be those of the base (such as a "
            "LoRA whose every B is zero); it was saved before it was trained, or its trained tensors were lost: save "
            "it anew, or serve the base by its name"
        )
    return ReadAdapter(config, files)


def add_adapter(bank: AdapterBank, name: str, adapter: ReadAdapter) -> None:
    """Adds an adapter that was read for the bank's model, as ``name``."""
    bank.add(name, adapter.config)
    for part, file in zip(bank.entry(name).parts, adapter.files, strict=True):
        for path, stack, slot in bank.places_of(part):
            stack.fill(slot, {key: file.tensors[_key(bank, part, path, key)] for key in stack.tensors(slot)})


def _parts(file: AdapterFile, bank: AdapterBank) -> list[AdapterFile]:
    if file.fields["peft_type"].startswith("MMPEFT_"):
        return [file]
    config: Any = _config_of(file.folder, file.fields)
    return split(file, bank.model, getattr(config, "scaling_at", lambda _: 1.0))


def read_config(directory: str | Path) -> AdapterConfig:
    """The config of a PEFT directory in our terms, as its fields say it; what changes the maths and is lacking here is
    refused. `load_adapter` also goes by the tensors."""
    composed, folders = _folders(Path(directory))
    for folder in folders:
        if beside := [field for field in BESIDE if read_fields(folder).get(field) not in NOT_SET]:
            raise RefusedError(
                f"{folder / CONFIG_FILE}: {beside[0]} is set, whose parts the tensors tell; load it"
            )
    configs = read_parts(directory)
    return HybridConfig(configs) if composed else configs[0]


def read_parts(directory: str | Path) -> list[AdapterConfig]:
    """The method of every folder of an adapter, as its fields say it."""
    return [_config_of(folder, read_fields(folder)) for folder in _folders(Path(directory))[1]]


def _folders(directory: Path) -> tuple[bool, list[Path]]:
    """Whether an adapter has several parts, and where they lie.

    Raises:
        RefusedError: a field is set that changes the maths and is lacking here.
    """
    raw = read_fields(directory)
    _check_fields(directory, raw)
    if not HybridConfig.reads_peft(raw):
        return False, [directory]
    names = raw.get("parts")
    if not isinstance(names, list) or not all(
        isinstance(n, str) and NAME_PATTERN.fullmatch(n) for n in names
    ):
        raise RefusedError(
            f"{directory / CONFIG_FILE}: parts is {names!r}, wanted the names of its subfolders"
        )
    for name in names:
        _check_fields(directory / name, read_fields(directory / name))
    return True, [directory / name for name in names]


def _check_fields(directory: Path, raw: dict[str, Any]) -> None:
    refused = dict.fromkeys(field for config in METHODS for field in config.peft_refused)
    changed = [key for key in refused if raw.get(key) not in NOT_SET]
    if changed:
        values = ", ".join(f"{key} is {raw[key]!r}" for key in changed)
        raise RefusedError(
            f"{directory / CONFIG_FILE}: {values}, which is not supported and changes what the tensors mean; "
            f"{MERGE}"
        )


def _config_of(directory: Path, fields: dict[str, Any]) -> AdapterConfig:
    try:
        return _config_from_peft(fields)
    except (ValueError, TypeError) as error:
        raise RefusedError(f"{directory / CONFIG_FILE}: {error}") from None


def _config_from_peft(raw: dict[str, Any]) -> AdapterConfig:
    for config in METHODS:
        if config.reads_peft(raw):
            return config.from_peft(raw)
    known = dict.fromkeys(config.peft_type for config in (*METHODS, HybridConfig))
    raise RefusedError(f"peft_type is {raw.get('peft_type')!r}; known are {', '.join(map(repr, known))}")


def _key(bank: AdapterBank, part: MethodPart, path: str, key: str) -> str:
    """The key of a tensor in the file."""
    return key if path == INPUTS else f"{KEY_PREFIX}{expert_key(bank.model, path, part.sites)}.{key}"


def _saved_key(bank: AdapterBank, part: MethodPart, path: str, key: str) -> str:
    """The key of a tensor in a file that PEFT reads, which calls those of embeddings otherwise."""
    module = None if path == INPUTS or split_path(bank.model, path) else bank.model.get_submodule(path)
    is_embedding = isinstance(module, nn.Embedding)
    theirs = {ours: name for name, ours in EMBEDDING_NAMES.items()} if is_embedding else {}
    return _key(bank, part, path, theirs.get(key, key))


def _target_names(bank: AdapterBank, sites: list[str]) -> list[str]:
    """The last names of the sites where those mean exactly these sites in this model, else their paths."""
    last_names = {last_name(path) for path in sites}
    named = {path for path, _ in bank.model.named_modules() if last_name(path) in last_names}
    return sorted(last_names if named == set(sites) else sites)


def _shapes(bank: AdapterBank, part: MethodPart) -> dict[str, list[int]]:
    """Key -> shape of every tensor that the file of such a part holds."""
    return {
        _key(bank, part, path, key): shape
        for path in part.sites
        for key, shape in bank.shapes(path, part.config).items()
    }


def _changes_nothing(bank: AdapterBank, part: MethodPart, file: AdapterFile) -> bool:
    return all(
        part.config.changes_nothing(
            _layer(bank, path),
            {key: file.tensors[_key(bank, part, path, key)] for key in bank.shapes(path, part.config)},
        )
        for path in part.sites
    )


def _layer(bank: AdapterBank, path: str) -> nn.Module:
    if path == INPUTS:
        return bank.model.get_input_embeddings()
    experts = split_path(bank.model, path)
    return experts[0] if experts else bank.model.get_submodule(path)


def _check_tensors(file: AdapterFile, wanted: dict[str, list[int]]) -> None:
    tensors, where = file.tensors, file.weights
    missing, unexpected = wanted.keys() - tensors.keys(), tensors.keys() - wanted.keys()
    if missing or unexpected:
        raise RefusedError(
            f"{where} does not fit this model: {len(missing)} of {len(wanted)} tensors are missing"
            f"{_example(missing)} and {len(unexpected)} are unexpected{_example(unexpected)}; it was made "
            "for another base model or with other target_modules"
        )
    for key, tensor in tensors.items():
        if list(tensor.shape) != wanted[key]:
            raise RefusedError(f"{where}: {key} has shape {list(tensor.shape)}, wanted {wanted[key]}")
        if not tensor.is_floating_point():
            raise RefusedError(f"{where}: {key} holds {tensor.dtype}, wanted floating-point numbers")
        if not tensor.float().isfinite().all():
            raise RefusedError(f"{where}: {key} holds NaN or infinite values")


def _example(keys: set[str]) -> str:
    return f" (such as {min(keys)})" if keys else ""

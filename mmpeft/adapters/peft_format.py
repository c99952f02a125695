"""One adapter <-> one directory in Hugging Face PEFT's format.

``adapter_config.json`` and ``adapter_model.safetensors`` whose keys are relative to the language model, so
that plain ``PeftModel.from_pretrained`` and other servers read them. Reading is strict where PEFT only warns.

Methods that PEFT has no format for use the same two files: ``peft_type`` is ``MMPEFT_`` and the method's name, the
other fields are the config's, and a tensor's key is ``base_model.model.<path of the layer>.<name>`` as in PEFT. A
finetune of several methods is a directory with a part in each subfolder, listed in its ``adapter_config.json``.

Each method knows its own fields: `AdapterConfig.to_peft` and `from_peft`.

Source: PEFT docs, "PEFT checkpoint format"; ``peft/tuners/{lora,ia3,prompt_tuning,prefix_tuning}/config.py``.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mmpeft.adapters.architecture import last_name
from mmpeft.adapters.bank import INPUTS, NAME_PATTERN, AdapterBank, MethodPart
from mmpeft.adapters.experts import expert_key, split_path
from mmpeft.adapters.methods.base import AdapterConfig
from mmpeft.adapters.methods.hybrid import HybridConfig
from mmpeft.adapters.methods.registry import METHODS
from mmpeft.errors import RefusedError
from mmpeft.files import save_tensors, write_json

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."
UNSUPPORTED = (
    *("bias", "modules_to_save", "trainable_token_indices"),
    *("layers_to_transform", "exclude_modules"),
)
"""Fields of every PEFT config that, when set, change what the tensors mean; `AdapterConfig.peft_refused` has those of
one method. Fields that steer training only, or that tell how the base stores its weight (``fan_in_fan_out``), may hold
anything."""


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
            _key(bank, part, path, key): tensor
            for path, stack, slot in bank.places_of(part)
            for key, tensor in stack.tensors(slot).items()
        }
        save_tensors(tensors, directory / folder / WEIGHTS_FILE)
        written += [directory / folder / file for file in (CONFIG_FILE, WEIGHTS_FILE)]
    return written


def load_adapter(bank: AdapterBank, name: str, directory: str | Path, replace: bool = False) -> None:
    """Adds the adapter in ``directory`` to the bank as ``name``.

    Args:
        replace: whether it may take the place of one that the bank has under this name.

    Raises:
        RefusedError: anything but exactly the tensors that its config promises for this model. The bank is
            unchanged then.
    """
    directory = Path(directory)
    config = read_config(directory)
    try:
        planned = bank.plan(config)
    except ValueError as error:
        raise RefusedError(f"{directory / CONFIG_FILE}: {error}") from None
    tensors: list[dict[str, Tensor]] = []
    for folder, part in zip(_folders(directory, config), planned, strict=True):
        tensors.append(_read_tensors(folder))
        _check_tensors(tensors[-1], _shapes(bank, part), folder / WEIGHTS_FILE)
    if replace and name in bank:
        bank.remove(name)
    bank.add(name, config)
    for part, own in zip(bank.entry(name).parts, tensors, strict=True):
        for path, stack, slot in bank.places_of(part):
            stack.fill(slot, {key: own[_key(bank, part, path, key)] for key in stack.tensors(slot)})


def _folders(directory: Path, config: AdapterConfig) -> list[Path]:
    """Where the parts of an adapter lie."""
    if not config.composed:
        return [directory]
    return [directory / folder for folder in _read_json(directory)["parts"]]


def read_config(directory: str | Path) -> AdapterConfig:
    """The config of a PEFT directory in our terms; what changes the maths and is lacking here is refused."""
    path = Path(directory) / CONFIG_FILE
    raw = _read_json(Path(directory))
    refused = dict.fromkeys([*UNSUPPORTED, *(field for config in METHODS for field in config.peft_refused)])
    changed = [key for key in refused if raw.get(key) not in (None, False, "none", [], {})]
    if changed:
        values = ", ".join(f"{key} is {raw[key]!r}" for key in changed)
        raise RefusedError(f"{path}: {values}, which is not supported and changes what the tensors mean")
    if HybridConfig.reads_peft(raw):
        names = raw.get("parts")
        if not isinstance(names, list) or not all(
            isinstance(n, str) and NAME_PATTERN.fullmatch(n) for n in names
        ):
            raise RefusedError(f"{path}: parts is {names!r}, wanted the names of its subfolders")
        return HybridConfig([read_config(path.parent / name) for name in names])
    try:
        return _config_from_peft(raw)
    except (ValueError, TypeError) as error:
        raise RefusedError(f"{path}: {error}") from None


def _config_from_peft(raw: dict[str, Any]) -> AdapterConfig:
    for config in METHODS:
        if config.reads_peft(raw):
            return config.from_peft(raw)
    known = dict.fromkeys(config.peft_type for config in (*METHODS, HybridConfig))
    raise RefusedError(f"peft_type is {raw.get('peft_type')!r}; known are {', '.join(map(repr, known))}")


def _read_json(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise RefusedError(f"{directory} is no PEFT adapter: it has no {CONFIG_FILE}")
    try:
        raw = json.loads(path.read_text())
    except ValueError as error:  # not JSON, or not even text
        raise RefusedError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(raw, dict):
        raise RefusedError(f"{path}: wanted a JSON object, got {type(raw).__name__}")
    return raw


def _key(bank: AdapterBank, part: MethodPart, path: str, key: str) -> str:
    """The key of a tensor in the file."""
    return key if path == INPUTS else f"{KEY_PREFIX}{expert_key(bank.model, path, part.sites)}.{key}"


def _target_names(bank: AdapterBank, sites: list[str]) -> list[str]:
    """The last names of the sites where those mean exactly these sites in this model, else their paths."""
    last_names = {last_name(path) for path in sites}
    named = {path for path, _ in bank.model.named_modules() if last_name(path) in last_names}
    return sorted(last_names if named == set(sites) else sites)


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    path = directory / WEIGHTS_FILE
    if not path.is_file():
        found = ", ".join(sorted(p.name for p in directory.iterdir())) or "nothing"
        raise RefusedError(f"{directory} has no {WEIGHTS_FILE} (found {found}); pickled weights are not read")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise RefusedError(
            f"{path}: not a readable safetensors file ({error}); it may be truncated"
        ) from None


def _shapes(bank: AdapterBank, part: MethodPart) -> dict[str, list[int]]:
    """Key -> shape of every tensor that the file of such a part holds."""
    return {
        _key(bank, part, path, key): shape
        for path in part.sites
        for key, shape in bank.shapes(path, part.config).items()
    }


def _check_tensors(tensors: dict[str, Tensor], wanted: dict[str, list[int]], where: Path) -> None:
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

"""One adapter <-> one directory in Hugging Face PEFT's format.

``adapter_config.json`` and ``adapter_model.safetensors`` whose keys are relative to the language model, so that
plain ``PeftModel.from_pretrained`` and other servers read them. Reading is strict where PEFT only warns.

Source: PEFT docs, "PEFT checkpoint format"; ``peft/tuners/{lora,ia3}/config.py``.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmpeft.adapters.bank import AdapterBank
from mmpeft.adapters.ia3 import IA3Config
from mmpeft.adapters.lora import LoraConfig
from mmpeft.adapters.sites import is_feedforward
from mmpeft.adapters.stack import AdapterConfig

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."


def save_adapter(bank: AdapterBank, name: str, directory: str | Path, base_name: str) -> None:
    """Writes adapter ``name`` to ``directory``; ``base_name`` is recorded as its base model."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {KEY_PREFIX + key: t.cpu().contiguous() for key, t in bank.tensors(name).items()}
    save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    config = _config_to_peft(bank, name) | {"base_model_name_or_path": base_name}
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def load_adapter(bank: AdapterBank, name: str, directory: str | Path) -> None:
    """Adds the adapter in ``directory`` to the bank as ``name``.

    Raises:
        ValueError: anything but exactly the tensors that its config promises for this model. The bank is
            unchanged then.
    """
    directory = Path(directory)
    config = read_config(directory)
    tensors = _read_tensors(directory)
    bank.add(name, config)
    try:
        _fill(bank, name, tensors, directory)
    except ValueError:
        bank.remove(name)
        raise


def read_config(directory: str | Path) -> AdapterConfig:
    """The config of a PEFT directory in our terms; fields that change the maths and that we lack are refused."""
    path = Path(directory) / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{directory} is no PEFT adapter: it has no {CONFIG_FILE}")
    try:
        raw: dict[str, Any] = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if raw.get("peft_type") == "LORA":
        return _lora_from_peft(raw, path)
    if raw.get("peft_type") == "IA3":
        _refuse(raw, path, {"modules_to_save": None, "fan_in_fan_out": False})
        return IA3Config(_required(raw, "target_modules", path), raw.get("feedforward_modules") or [])
    raise ValueError(f"{path}: peft_type is {raw.get('peft_type')!r}; known are 'LORA' and 'IA3'")


def _lora_from_peft(raw: dict[str, Any], path: Path) -> LoraConfig:
    neutral = {"use_dora": False, "modules_to_save": None, "bias": "none", "layers_to_transform": None}
    _refuse(raw, path, neutral | {"rank_pattern": {}, "alpha_pattern": {}, "fan_in_fan_out": False})
    return LoraConfig(
        rank=_required(raw, "r", path),
        alpha=raw.get("lora_alpha", 8),
        dropout=raw.get("lora_dropout", 0.0),
        target_modules=_required(raw, "target_modules", path),
        rslora=raw.get("use_rslora", False),
    )


def _refuse(raw: dict[str, Any], path: Path, neutral: dict[str, Any]) -> None:
    for key, value in neutral.items():
        if raw.get(key) not in (value, None, [], {}):
            raise ValueError(f"{path}: {key} is {raw[key]!r}, which this adapter method does not support")


def _required(raw: dict[str, Any], key: str, path: Path) -> Any:
    if not raw.get(key):
        raise ValueError(f"{path}: {key} is missing")
    return raw[key]


def _config_to_peft(bank: AdapterBank, name: str) -> dict[str, Any]:
    """Only the keys that matter: older PEFT refuses unknown ones. Targets are always written out, because
    PEFT's own defaults differ from the paper's for several architectures."""
    entry = bank.entry(name)
    targets = sorted(entry.sites) if not _by_suffix(bank, entry.sites) else sorted(_suffixes(entry.sites))
    common = {"task_type": "CAUSAL_LM", "inference_mode": True, "target_modules": targets}
    if isinstance(entry.config, IA3Config):
        chosen = [path for path in entry.sites if is_feedforward(path, entry.config)]
        feedforward = sorted(_suffixes(chosen) & set(targets)) or sorted(set(chosen) & set(targets))
        return {"peft_type": "IA3", **common, "feedforward_modules": feedforward, "fan_in_fan_out": False}
    config = entry.config
    assert isinstance(config, LoraConfig), f"no PEFT format for {type(config).__name__}"
    return {
        "peft_type": "LORA",
        **common,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "bias": "none",
        "fan_in_fan_out": False,
    }


def _suffixes(paths: list[str]) -> set[str]:
    return {path.rsplit(".", 1)[-1] for path in paths}


def _by_suffix(bank: AdapterBank, sites: list[str]) -> bool:
    """Whether naming the sites by their last name means exactly those sites in this model."""
    suffixes = _suffixes(sites)
    named = {path for path, _ in bank.model.named_modules() if path.rsplit(".", 1)[-1] in suffixes}
    return named == set(sites)


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    path = directory / WEIGHTS_FILE
    if not path.is_file():
        found = ", ".join(sorted(p.name for p in directory.iterdir())) or "nothing"
        raise ValueError(f"{directory} has no {WEIGHTS_FILE} (found {found}); pickled .bin weights are not read")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error}); it may be truncated") from None


def _fill(bank: AdapterBank, name: str, tensors: dict[str, Tensor], directory: Path) -> None:
    where = directory / WEIGHTS_FILE
    wanted = {KEY_PREFIX + key: tensor for key, tensor in bank.tensors(name).items()}
    missing, unexpected = wanted.keys() - tensors.keys(), tensors.keys() - wanted.keys()
    if missing or unexpected:
        raise ValueError(
            f"{where} does not fit this model: {len(missing)} of {len(wanted)} tensors are missing"
            f"{_example(missing)} and {len(unexpected)} are unexpected{_example(unexpected)}; it was made for "
            "another base model or with other target_modules"
        )
    for key, tensor in tensors.items():
        if tensor.shape != wanted[key].shape:
            raise ValueError(f"{where}: {key} has shape {list(tensor.shape)}, wanted {list(wanted[key].shape)}")
        if not math.isfinite(float(tensor.float().abs().max())):
            raise ValueError(f"{where}: {key} holds NaN or infinite values")
    for path in bank.entry(name).sites:
        prefix = f"{KEY_PREFIX}{path}."
        own = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
        with torch.no_grad():
            bank.stack(name, path).fill(bank.entry(name).slot, own)


def _example(keys: set[str]) -> str:
    return f" (such as {min(keys)})" if keys else ""

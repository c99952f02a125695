"""One adapter <-> one directory in Hugging Face PEFT's format.

``adapter_config.json`` and ``adapter_model.safetensors`` whose keys are relative to the language model, so
that plain ``PeftModel.from_pretrained`` and other servers read them. Reading is strict where PEFT only warns.

Source: PEFT docs, "PEFT checkpoint format"; ``peft/tuners/{lora,ia3}/config.py``.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmpeft.adapters.bank import AdapterBank
from mmpeft.adapters.ia3 import IA3Config
from mmpeft.adapters.lora import LoraConfig
from mmpeft.adapters.sites import find_sites, is_feedforward, linear_features
from mmpeft.adapters.stack import AdapterConfig

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."
UNSUPPORTED = (
    *("use_dora", "use_qalora", "use_bdlora", "kasa_config", "arrow_config", "monteclora_config"),
    *("bias", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters"),
    *("rank_pattern", "alpha_pattern", "layers_to_transform", "layer_replication", "exclude_modules"),
    "alora_invocation_tokens",
)
"""Fields of PEFT's configs that, when set, change what the tensors mean. Fields that steer training only, or
that tell how the base stores its weight (``fan_in_fan_out``), may hold anything."""
CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Ways to start a LoRA that also change the base's weights: the tensors alone are not the adapter."""


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
    try:
        wanted = _shapes(bank, config)
    except ValueError as error:
        raise ValueError(f"{directory / CONFIG_FILE}: {error}") from None
    tensors = _read_tensors(directory)
    _check_tensors(tensors, wanted, directory / WEIGHTS_FILE)
    entry = bank.add(name, config)
    for path in entry.sites:
        stack = bank.stack(name, path)
        own = {key: tensors[f"{KEY_PREFIX}{path}.{key}"] for key in stack.tensors(entry.slot)}
        stack.fill(entry.slot, own)


def read_config(directory: str | Path) -> AdapterConfig:
    """The config of a PEFT directory in our terms; what changes the maths and is lacking here is refused."""
    path = Path(directory) / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{directory} is no PEFT adapter: it has no {CONFIG_FILE}")
    try:
        raw = json.loads(path.read_text())
    except ValueError as error:  # not JSON, or not even text
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: wanted a JSON object, got {type(raw).__name__}")
    changed = [key for key in UNSUPPORTED if raw.get(key) not in (None, False, "none", [], {})]
    changed += ["init_lora_weights"] if str(raw.get("init_lora_weights")).startswith(CHANGES_BASE) else []
    if changed:
        values = ", ".join(f"{key} is {raw[key]!r}" for key in changed)
        raise ValueError(f"{path}: {values}, which is not supported and changes what the tensors mean")
    try:
        return _config_from_peft(raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _config_from_peft(raw: dict[str, Any]) -> AdapterConfig:
    if raw.get("peft_type") == "LORA":
        return LoraConfig(
            rank=_required(raw, "r"),
            alpha=raw.get("lora_alpha", 8),
            dropout=raw.get("lora_dropout", 0.0),
            target_modules=_required(raw, "target_modules"),
            rslora=raw.get("use_rslora", False),
        )
    if raw.get("peft_type") == "IA3":
        return IA3Config(_required(raw, "target_modules"), raw.get("feedforward_modules") or [])
    raise ValueError(f"peft_type is {raw.get('peft_type')!r}; known are 'LORA' and 'IA3'")


def _required(raw: dict[str, Any], key: str) -> Any:
    if not raw.get(key):
        raise ValueError(f"{key} is missing")
    return raw[key]


def _config_to_peft(bank: AdapterBank, name: str) -> dict[str, Any]:
    """Only the keys that matter: older PEFT refuses unknown ones. Targets are always written out, because
    PEFT's own defaults differ from the paper's for several architectures."""
    entry = bank.entry(name)
    config = entry.config
    common = {"task_type": "CAUSAL_LM", "inference_mode": True, "fan_in_fan_out": False}
    if isinstance(config, IA3Config):
        feedforward = _target_names(bank, [path for path in entry.sites if is_feedforward(path, config)])
        others = _target_names(bank, [path for path in entry.sites if not is_feedforward(path, config)])
        return {
            "peft_type": "IA3",
            **common,
            "target_modules": sorted(others + feedforward),
            "feedforward_modules": feedforward,
        }
    assert isinstance(config, LoraConfig), f"no PEFT format for {type(config).__name__}"
    return {
        "peft_type": "LORA",
        **common,
        "target_modules": _target_names(bank, entry.sites),
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "bias": "none",
    }


def _target_names(bank: AdapterBank, sites: list[str]) -> list[str]:
    """The last names of the sites where those mean exactly these sites in this model, else their paths."""
    last_names = {path.rsplit(".", 1)[-1] for path in sites}
    named = {path for path, _ in bank.model.named_modules() if path.rsplit(".", 1)[-1] in last_names}
    return sorted(last_names if named == set(sites) else sites)


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    path = directory / WEIGHTS_FILE
    if not path.is_file():
        found = ", ".join(sorted(p.name for p in directory.iterdir())) or "nothing"
        raise ValueError(f"{directory} has no {WEIGHTS_FILE} (found {found}); pickled weights are not read")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error}); it may be truncated") from None


def _shapes(bank: AdapterBank, config: AdapterConfig) -> dict[str, list[int]]:
    """Key -> shape of every tensor that the file of such an adapter holds."""
    shapes = {}
    for path, module in find_sites(bank.model, config).items():
        features = linear_features(module)
        assert features is not None, f"find_sites returned {path}, which is no linear"
        if isinstance(config, LoraConfig):
            shapes[f"{KEY_PREFIX}{path}.lora_A.weight"] = [config.rank, features[0]]
            shapes[f"{KEY_PREFIX}{path}.lora_B.weight"] = [features[1], config.rank]
        elif isinstance(config, IA3Config):
            feedforward = is_feedforward(path, config)
            shapes[f"{KEY_PREFIX}{path}.ia3_l"] = [1, features[0]] if feedforward else [features[1], 1]
    return shapes


def _check_tensors(tensors: dict[str, Tensor], wanted: dict[str, list[int]], where: Path) -> None:
    missing, unexpected = wanted.keys() - tensors.keys(), tensors.keys() - wanted.keys()
    if missing or unexpected:
        raise ValueError(
            f"{where} does not fit this model: {len(missing)} of {len(wanted)} tensors are missing"
            f"{_example(missing)} and {len(unexpected)} are unexpected{_example(unexpected)}; it was made "
            "for another base model or with other target_modules"
        )
    for key, tensor in tensors.items():
        if list(tensor.shape) != wanted[key]:
            raise ValueError(f"{where}: {key} has shape {list(tensor.shape)}, wanted {wanted[key]}")
        if not tensor.is_floating_point():
            raise ValueError(f"{where}: {key} holds {tensor.dtype}, wanted floating-point numbers")
        if not tensor.float().isfinite().all():
            raise ValueError(f"{where}: {key} holds NaN or infinite values")


def _example(keys: set[str]) -> str:
    return f" (such as {min(keys)})" if keys else ""

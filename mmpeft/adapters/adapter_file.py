"""An adapter file: the fields and tensors of one folder in PEFT's format, told in the names of the base they go to.

Where an adapter sits is told twice, by the fields (``target_modules``, ``exclude_modules``, ``layers_to_transform``)
and by the keys of the tensors. Both are read, and `fitted` leaves what they agree on: the paths of the layers.

Source: ``peft/tuners/tuners_utils.py`` (``check_target_module_exists``) and ``peft/utils/save_and_load.py``.
"""

import json
import pickle
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mmpeft.adapters.architecture import find_linears
from mmpeft.adapters.experts import find_experts
from mmpeft.adapters.methods.base import names_module
from mmpeft.adapters.patterns import by_pattern
from mmpeft.adapters.targets import further_layers
from mmpeft.errors import RefusedError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_FILE = "adapter_model.bin"
KEY_PREFIX = "base_model.model."
EMBEDDING_NAMES = {"lora_embedding_A": "lora_A.weight", "lora_embedding_B": "lora_B.weight"}
"""What PEFT calls the tensors of an embedding -> what it calls those of a linear of the same shapes."""
INNER_MODELS = ("language_model", "text_model", "llm", "thinker")
"""What classes of multimodal models call the language model inside them."""

_TENSOR = re.compile(
    rf"(?P<path>{re.escape(KEY_PREFIX)}.+)\.(?P<name>lora_A|lora_B|lora_embedding_A|lora_embedding_B|"
    r"lora_magnitude_vector|ia3_l)(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?(?P<ending>\.weight|\.bias)?"
)


@dataclass
class AdapterFile:
    """One folder of an adapter of one method."""

    folder: Path
    fields: dict[str, Any]
    tensors: dict[str, Tensor]
    weights: Path
    """The file that the tensors are from, for errors."""

    @property
    def config(self) -> Path:
        """The file that the fields are from, for errors."""
        return self.folder / CONFIG_FILE


def read_fields(directory: str | Path) -> dict[str, Any]:
    """The fields of ``adapter_config.json``.

    Raises:
        RefusedError: there is none, or it is no JSON object.
    """
    path = Path(directory) / CONFIG_FILE
    if not path.is_file():
        raise RefusedError(f"{directory} is no PEFT adapter: it has no {CONFIG_FILE}")
    try:
        raw = json.loads(path.read_text())
    except ValueError as error:  # not JSON, or not even text
        raise RefusedError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(raw, dict):
        raise RefusedError(f"{path}: wanted a JSON object, got {type(raw).__name__}")
    return raw


def read_file(directory: Path) -> AdapterFile:
    """Fields and tensors of a folder, with the keys that PEFT writes today.

    Raises:
        RefusedError: a file is missing or damaged, or holds several adapters.
    """
    fields = read_fields(directory)
    path = next((p for name in (WEIGHTS_FILE, PICKLED_FILE) if (p := directory / name).is_file()), None)
    if path is None:
        found = ", ".join(sorted(p.name for p in directory.iterdir())) or "nothing"
        raise RefusedError(f"{directory} has no {WEIGHTS_FILE} and no {PICKLED_FILE} (found {found})")
    tensors = _read_safetensors(path) if path.name == WEIGHTS_FILE else _read_pickled(path)
    return AdapterFile(directory, fields, _todays_keys(tensors, path), path)


def fitted(file: AdapterFile, model: nn.Module) -> AdapterFile:
    """``file`` with the fields and keys of the layers of ``model``: ``target_modules`` names what the fields choose,
    and keys of a language model inside a multimodal one are those of the language model itself.

    Fields that choose nothing here are left as they are, for the errors of `find_sites`.

    Raises:
        RefusedError: ``target_parameters`` names what is no projection of packed experts, such as a router's weight.
    """
    if str(file.fields.get("peft_type")).startswith("MMPEFT_"):
        return file
    fields = dict(file.fields)
    inner, ours = _inner_prefix(file, model)
    linears = find_linears(model) | further_layers(model, ("head", "embedding"), "")
    experts = find_experts(model)
    _check_parameters(file, experts)
    theirs = {
        path: inner + path.removeprefix(ours) if path.startswith(ours) else path for path in linears | experts
    }
    chosen = [path for path in linears if _chooses(fields, theirs[path])]
    feedforwards = [path for path in chosen if _names_feedforward(theirs[path], fields)]
    plain = feedforwards == [p for p in chosen if names_module(p, fields.get("feedforward_modules") or [])]
    if chosen and (inner != ours or not plain or not _says_it_plainly(fields, linears)):
        fields["target_modules"] = chosen
        if "feedforward_modules" in fields:
            fields["feedforward_modules"] = feedforwards
        fields |= _patterns_by_path(fields, {path: theirs[path] for path in [*chosen, *experts]})
    if inner == ours:
        return replace(file, fields=fields)
    warnings.warn(
        f"{file.weights}: its keys are those of a multimodal model; {inner}* is read as {ours}* of "
        f"{type(model).__name__}",
        stacklevel=2,
    )
    old, new = KEY_PREFIX + inner, KEY_PREFIX + ours
    renamed = {
        new + key.removeprefix(old) if key.startswith(old) else key: t for key, t in file.tensors.items()
    }
    return replace(file, fields=fields, tensors=renamed)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise RefusedError(
            f"{path}: not a readable safetensors file ({error}); it may be truncated"
        ) from None


def _read_pickled(path: Path) -> dict[str, Tensor]:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RefusedError(
            f"{path}: not readable as tensors alone ({reason}); it is truncated, or holds objects that would run code: "
            "save it anew from PEFT, which writes safetensors"
        ) from None
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise RefusedError(f"{path}: wanted a dict of tensors, got {type(tensors).__name__}")
    return tensors


def _todays_keys(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Without the adapter's own name and what torch.compile puts in, which some trainers leave in their keys."""
    keys, adapters = dict[str, Tensor](), set[str]()
    for key, tensor in tensors.items():
        if (
            ".original_module." in key
        ):  # the base's own, which PEFT keeps beside a retrained module and never reads
            continue
        plain = key.replace("_orig_mod.", "").replace(".modules_to_save.", ".")
        if plain != key and plain in tensors and torch.equal(tensors[plain], tensor):
            continue  # under bias="all" PEFT writes a retrained bias twice
        if match := _TENSOR.fullmatch(plain):
            adapters |= {match["adapter"]} - {None}
            name = EMBEDDING_NAMES.get(match["name"], match["name"])
            ending = "" if match["name"] == "lora_magnitude_vector" else match["ending"] or ""
            plain = f"{match['path']}.{name}{ending}"
        if len(adapters) > 1 or plain in keys:
            raise RefusedError(f"{path} holds several adapters (see {key}): save each to a folder of its own")
        keys[plain] = tensor
    return keys


def _inner_prefix(file: AdapterFile, model: nn.Module) -> tuple[str, str]:
    """What the file's paths begin with, and what those of the model do instead; twice the same where they fit."""
    paths = [
        match["path"].removeprefix(KEY_PREFIX) for key in file.tensors if (match := _TENSOR.fullmatch(key))
    ]
    modules = {path for path, _ in model.named_modules()}
    if not paths or any(path in modules for path in paths):
        return "", ""
    for name in INNER_MODELS:
        for outer in ("model.", "model.model.", ""):
            inner, kept = (
                f"{outer}{name}.",
                outer.removeprefix("model.") if "model.model." in outer else outer,
            )
            if all(path.startswith(inner) and kept + path.removeprefix(inner) in modules for path in paths):
                return inner, kept
    return "", ""


def _chooses(fields: dict[str, Any], path: str) -> bool:
    """PEFT's rule: whether the fields put an adapter on the module at ``path``."""
    targets, excluded = fields.get("target_modules") or [], fields.get("exclude_modules") or []
    if any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in fields.get("modules_to_save") or []):
        return False
    if names_module(path, excluded) or not names_module(path, targets):
        return False
    layers = fields.get("layers_to_transform")
    if layers is None or layers == [] or isinstance(targets, str) or path in targets:
        return True
    patterns = fields.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    numbered = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(\d+)\."]
    match = next((m for pattern in numbered if (m := re.match(pattern, path))), None)
    return match is not None and int(match[1]) in (layers if isinstance(layers, list) else [layers])


def _names_feedforward(path: str, fields: dict[str, Any]) -> bool:
    """PEFT's rule, in which a name may begin in the middle of another: ``v_proj`` names ``qkv_proj`` too.

    Source: ``peft/tuners/ia3/model.py`` (``_check_target_module_feedforward``).
    """
    names = fields.get("feedforward_modules") or []
    return names_module(path, names) if isinstance(names, str) else path.endswith(tuple(names))


def _says_it_plainly(fields: dict[str, Any], paths: dict[str, nn.Module]) -> bool:
    """Whether target_modules and feedforward_modules alone name the layers, each of their names one at least."""
    if fields.get("exclude_modules") or fields.get("layers_to_transform") not in (None, []):
        return False
    named = [fields.get(field) or [] for field in ("target_modules", "feedforward_modules")]
    return all(
        any(names_module(path, [name]) for path in paths)
        for names in named
        if not isinstance(names, str)
        for name in names
    )


def _check_parameters(file: AdapterFile, experts: Iterable[str]) -> None:
    named = file.fields.get("target_parameters") or []
    if others := [name for name in named if not any(names_module(path, [name]) for path in experts)]:
        known = ", ".join(sorted({".".join(path.split(".")[-2:]) for path in experts})) or "none"
        raise RefusedError(
            f"{file.config}: target_parameters names {others[0]!r}, but is served on packed experts alone (here: "
            f"{known}), not on weights of routers or others; apply the adapter in PEFT, by merge_and_unload, and serve "
            "the model that this makes"
        )


def _patterns_by_path(fields: dict[str, Any], theirs: dict[str, str]) -> dict[str, Any]:
    """rank_pattern and alpha_pattern with a key for every layer that one of theirs matches."""
    renamed: dict[str, Any] = {}
    for field in ("rank_pattern", "alpha_pattern"):
        own: dict[str, Any] = {}
        for path, name in theirs.items():
            value = by_pattern(fields.get(field) or {}, name, None)
            own |= {} if value is None else {re.escape(path): value}
        renamed |= {field: own} if own else {}
    return renamed

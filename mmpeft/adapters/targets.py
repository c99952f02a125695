"""Target modules: which layers of a language model an adapter goes to, and the sizes of what it reads."""

import difflib
import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmpeft.adapters.architecture import absent_roles, find_blocks, find_layers, find_linears, find_parts
from mmpeft.adapters.blocks import EXPERTS, RolePart, last_name, linear_features, text_config
from mmpeft.adapters.experts import expert_features, find_experts, split_path
from mmpeft.adapters.layer_choice import choose_layers
from mmpeft.adapters.methods.base import AdapterConfig, Beyond, names_module
from mmpeft.adapters.roles import CONTIGUOUS, GROUPED, ROLES, Role, attention_roles
from mmpeft.errors import RefusedError

NO_LAYERS = {
    "xlnet": "hands its layers (tokens, rows, features), but an adapter is chosen by row, which must come first",
    "reformer": "has reversible layers, which record no gradient for what is trained in them on frozen embeddings",
}
"""Families whose layers cannot be adapted, and why."""


def find_sites(model: nn.Module, config: AdapterConfig) -> dict[str, nn.Module]:
    """The layers that ``config`` names by ``target_modules`` and ``layers``, by their path in ``model``.

    Raises:
        RefusedError: a name matches nothing (the message has the closest names of this model), a role that is meant
            has no linear, or the decoder layers are not there.
    """
    linears, experts = find_linears(model), find_experts(model)
    targets = config.target_modules
    named = linears | experts if _says_experts(targets) else linears
    if config.roles is not None:
        chosen = {part.path for part in _parts_of(model, config, config.roles)}
        sites = {path: module for path, module in (linears | experts).items() if path in chosen}
    elif config.whole_feedforwards:
        whole = _feedforwards(model, needed=targets == "auto")
        sites = whole if targets == "auto" else _targeted(model, named | whole, linears, targets)
    else:
        sites = _targeted(model, named | further_layers(model, config.beyond, targets), linears, targets)
    for field in config.fields_of_targets:
        if getattr(config, field) not in ("auto", []):
            _chosen(model, sites, field, getattr(config, field))
    for path in sites.keys() & experts.keys():
        config.check_experts(path)
    for path, layer in sites.items():
        _check_sees_rows(model, path)
        config.check_layer(path, layer)
    if why := NO_LAYERS.get(str(getattr(getattr(model, "config", None), "model_type", None))):
        raise RefusedError(f"{type(model).__name__} {why}; choose another base")
    return sites if config.layers is None else _inside(model, sites, config.layers)


def further_layers(
    model: nn.Module, beyond: Sequence[Beyond], targets: str | list[str]
) -> dict[str, nn.Module]:
    """What ``targets`` may name beside linears, see `AdapterConfig.beyond`; a pattern means no norms."""
    getters = {"head": "get_output_embeddings", "embedding": "get_input_embeddings"}
    ends = {kind: getattr(model, getter, lambda: None)() for kind, getter in getters.items()}
    wanted = [ends[kind] for kind in beyond if kind in ends and ends[kind] is not None]
    norms = "norms" in beyond and not isinstance(targets, str)
    return {
        path: module
        for path, module in model.named_modules()
        if any(module is each for each in wanted) or (norms and is_norm(module))
    }


def is_norm(module: nn.Module) -> bool:
    """Whether it has one number for every feature."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 1 and linear_features(module) is None


def _targeted(
    model: nn.Module, layers: dict[str, nn.Module], linears: dict[str, nn.Module], targets: str | list[str]
) -> dict[str, nn.Module]:
    return linears if targets == "all-linear" else _chosen(model, layers, "target_modules", targets)


def _says_experts(targets: str | list[str]) -> bool:
    """Packed experts are meant only where they are named: ``down_proj`` means linears, as it does in PEFT."""
    return "experts" in targets if isinstance(targets, str) else any("experts" in name for name in targets)


def tell_left_out(model: nn.Module, name: str, config: AdapterConfig) -> None:
    """Warns where "all-linear" of the adapter ``name`` does not reach packed experts, with their parameters."""
    if all(part.target_modules != "all-linear" for part in config.parts()):
        return
    count = sum(
        parameter.numel()
        for path, module in model.named_modules()
        if last_name(path) in EXPERTS
        for parameter in module.parameters(recurse=False)
        if parameter.dim() == 3
    )
    if count:
        total = sum(parameter.numel() for parameter in model.parameters())
        warnings.warn(
            f"adapter {name!r}: all-linear leaves out {count:,} of {total:,} parameters, those of experts that are one "
            "tensor per projection and no linear; name them in target_modules too, such as experts.down_proj, to adapt "
            "them with LoRA or IA3",
            stacklevel=4,
        )


def settle(model: nn.Module, config: AdapterConfig) -> AdapterConfig:
    """The config with what it leaves to the model's architecture written out, where that is recognised."""
    if not any(getattr(config, field) == "auto" for field in config.fields_of_targets):
        return config  # as of every file
    try:
        parts = [part for block in find_blocks(model) for part in block.parts]
    except RefusedError:
        parts = []
    return config.settled([part.path for part in parts if part.role == "down"])


def _check_sees_rows(model: nn.Module, path: str) -> None:
    """Raises:
    RefusedError: the layer is an expert among a list of them, which gets tokens of which nobody knows the row.
    """
    names = path.split(".")
    lists = [i for i, name in enumerate(names[:-1]) if name == "experts" and names[i + 1].isdigit()]
    if lists:
        experts = ".".join(names[: lists[0] + 1])
        raise RefusedError(
            f"{path} of {type(model).__name__} is one of a list of experts ({experts}), each of which gets some tokens "
            "of a batch and not their rows; name linears outside of them in target_modules"
        )


def _feedforwards(model: nn.Module, needed: bool) -> dict[str, nn.Module]:
    """The whole feed-forward of every block; with ``needed``, it is an error if one was not recognised or no block has
    any."""
    try:
        blocks = find_blocks(model)
    except ValueError:
        if needed:
            raise
        return {}
    without = [block for block in blocks if block.feedforward is None]
    missing = [block.path for block in without if "down" not in absent_roles(block)]
    if needed and (missing or len(without) == len(blocks)):
        first = missing[0] if missing else blocks[0].path
        raise RefusedError(
            f"{type(model).__name__}: no feed-forward was recognised in {first}; name the layers that you mean "
            "in target_modules"
        )
    return {path: model.get_submodule(path) for block in blocks if (path := block.feedforward)}


def trained_features(model: nn.Module, path: str, config: AdapterConfig) -> Tensor | None:
    """The output features of the linear at ``path`` that train: of a fused projection those of
    `AdapterConfig.trained_roles`.

    Returns:
        (n,) int64, ascending; None is all of them.
    """
    roles = config.trained_roles(path) if len(attention_roles(path)) > 1 else None
    if roles is None:
        return None
    parts = [part.features for part in find_parts(model, roles) if part.path == path]
    known = [features for features in parts if features is not None]
    return torch.cat(known).sort().values if known else None


def _parts_of(model: nn.Module, config: AdapterConfig, roles: Sequence[Role]) -> list[RolePart]:
    """The parts that play one of ``roles``. A method that trains some features of a fused linear alone leaves out what
    mixes tokens in place of an attention: its keys and values are no features of their own.

    Raises:
        RefusedError: a fused linear of an order that is not known for such a method, or nothing is left of a role.
    """
    parts = find_parts(model, roles)
    if not parts:
        raise RefusedError(f"{type(model).__name__} has no linear that is {' or '.join(roles)}")
    trained = {part.path: config.trained_roles(part.path) for part in parts}
    alone = [part for part in parts if {*part.mixed_with} <= {*(trained[part.path] or part.mixed_with)}]
    for part in parts:
        if part not in alone and set(part.mixed_with) <= {*ROLES}:
            known = ", ".join(f"{name} of {family}" for name, family in sorted(CONTIGUOUS | GROUPED))
            raise RefusedError(
                f"{part.path} of {type(model).__name__} holds {part.role} and {', '.join(part.mixed_with)} in an order "
                f"that is not known for the family {text_config(model).model_type!r} (known: {known}); set "
                f"target_modules to [{last_name(part.path)!r}] to adapt all of it"
            )
    lacking = {part.role for part in parts} - {part.role for part in alone}
    if lacking:
        raise RefusedError(
            f"{type(model).__name__} has no linear that is {', '.join(sorted(lacking))} and nothing else: it "
            "mixes tokens without attention; name the linears that you mean in target_modules"
        )
    return alone


def layer_features(model: nn.Module, path: str) -> tuple[int, int]:
    """(in, out) features of a layer: a linear's own, one expert's of packed experts, (tokens, hidden size) of an
    embedding, a norm's on both sides, and the hidden size on both sides for a whole feed-forward."""
    if experts := split_path(model, path):
        return expert_features(*experts)[1:]
    module = model.get_submodule(path)
    if features := linear_features(module):
        return features
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if is_norm(module):
        size = cast(Tensor, module.weight).shape[0]
        return size, size
    hidden = _hidden_size(model)
    return hidden, hidden


def require_reader(configs: Iterable[AdapterConfig], image_shape: tuple[int | None, int] | None) -> None:
    """Raises:
    RefusedError: a method that changes what the model reads, where ``image_shape`` says that it is a language model
        alone: nobody would feed it there, and its rows would be those of the base.
    """
    unread = [f"{each.method} (peft_type {each.peft_type})" for each in configs if each.home == "inputs"]
    if unread and image_shape is None:
        raise RefusedError(
            f"{unread[0]} changes what the model reads, and a language model alone reads token ids only: its rows "
            "would be those of the base; use the bank of an mmpeft.models.multimodal.MultimodalModel, which also "
            "serves text without images"
        )


def _hidden_size(model: Any) -> int:
    return getattr(text_config(model), "hidden_size", None) or model.get_input_embeddings().weight.shape[1]


def _inside(
    model: nn.Module, sites: dict[str, nn.Module], layers: Sequence[int] | str
) -> dict[str, nn.Module]:
    paths = find_layers(model)
    prefixes = tuple(f"{paths[number]}." for number in choose_layers(len(paths), layers))
    kept = {path: module for path, module in sites.items() if path.startswith(prefixes)}
    if not kept:
        raise RefusedError(
            f"layers {layers!r} leaves none of the {len(sites)} linears that target_modules names in "
            f"{type(model).__name__}; the first is {next(iter(sites))}"
        )
    return kept


def _chosen(
    model: nn.Module, linears: dict[str, nn.Module], field: str, names: str | list[str]
) -> dict[str, nn.Module]:
    alternatives = [names] if isinstance(names, str) else [[name] for name in names]
    if isinstance(names, str):
        try:
            re.compile(names)
        except re.error as error:
            raise RefusedError(f"{field} {names!r} is not a valid pattern: {error}") from None
    unmatched = [each for each in alternatives if not any(names_module(path, each) for path in linears)]
    if unmatched or not names:
        wrong = [each if isinstance(each, str) else each[0] for each in unmatched]
        known = sorted({last_name(path) for path in linears})
        closest = sorted({hit for name in wrong for hit in difflib.get_close_matches(name, known, n=1)})
        plain = {last_name(path) for path in find_linears(model) if path in linears}
        beside = [name for name in known if name not in plain]
        hint = f"closest: {', '.join(map(repr, closest))}; " if closest else ""
        raise RefusedError(
            f"{field} {wrong or names!r} matched no linear of {type(model).__name__}; {hint}"
            f"its linears are called {', '.join(sorted(plain)) or '(it has none)'}"
            + (f"; also to be named are {', '.join(beside)}" if beside else "")
        )
    return {path: module for path, module in linears.items() if names_module(path, names)}

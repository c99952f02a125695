"""Target modules and parameter counts of every method in a language model, known from its config alone."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from mmpeft.adapters import AdapterConfig
from mmpeft.adapters.architecture import block_linears, find_blocks, find_layers, find_parts
from mmpeft.adapters.bank import INPUTS
from mmpeft.adapters.blocks import RolePart, last_name
from mmpeft.adapters.inputs import model_inputs
from mmpeft.adapters.methods.registry import METHODS
from mmpeft.adapters.places import num_parameters
from mmpeft.adapters.roles import ROLES
from mmpeft.adapters.targets import find_sites, layer_features, settle, trained_features
from mmpeft.errors import RefusedError
from mmpeft.models.language import load_pretrained, refusals_of_transformers
from mmpeft.reporting.tables import make_table


@dataclass
class RoleRow:
    """One role in all blocks."""

    role: str
    names: list[str]
    """Paths inside the block."""
    sites: int
    features: list[str]
    """``in -> out``, or what a fused linear has for the role."""


@dataclass
class MethodRow:
    """What one method would train."""

    method: str
    touches: list[str]
    """Roles; linears outside of the blocks by their path."""
    sites: int
    parameters: int


def empty_model(name: str) -> nn.Module:
    """The language model without weights: its modules and shapes, from the config alone.

    Raises:
        RefusedError: an encoder-decoder model.
    """
    config = load_pretrained(AutoConfig, name)
    if getattr(config, "is_encoder_decoder", False):
        raise RefusedError(
            f"{name} is an encoder-decoder model ({config.model_type}); choose a decoder-only language model"
        )
    with refusals_of_transformers(name), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def count_parameters(model: nn.Module) -> int:
    """All parameters, a tied head counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def role_rows(model: nn.Module) -> list[RoleRow]:
    """Roles in the order of `ROLES`; an ungated feed-forward has no gate.

    Raises:
        RefusedError: a role that no linear plays, see `find_parts`.
    """
    blocks = find_blocks(model)
    find_parts(model)  # a role that is missing is an error here too
    rows = []
    for role in ROLES:
        mine = [(block, part) for block in blocks for part in block.parts if part.role == role]
        if mine:
            names = _unique(part.path.removeprefix(f"{block.path}.") for block, part in mine)
            features = _unique(_features(model, part) for _, part in mine)
            rows.append(RoleRow(role, names, len(mine), features))
    return rows


def usual_methods() -> dict[str, AdapterConfig]:
    """The methods of the table, at their usual sizes."""
    return {label: method(**fields) for method in METHODS for label, fields in method.usual.items()}


def method_rows(model: nn.Module) -> list[MethodRow]:
    """What each method would touch by default, and how many numbers it would train; nothing where it is refused."""
    rows = []
    for method, config in usual_methods().items():
        try:
            rows.append(_method_row(model, method, config))
        except RefusedError as error:
            rows.append(MethodRow(method, [f"refused: {error}"], 0, 0))
    return rows


def _method_row(model: nn.Module, method: str, config: AdapterConfig) -> MethodRow:
    if config.home == "inputs":
        shapes = config.shapes(INPUTS, *config.input_features(model_inputs(model, None)))
        return MethodRow(method, ["inputs"], 1, sum(map(math.prod, shapes.values())))
    sites, settled = find_sites(model, config), settle(model, config)
    parameters = sum(num_parameters(model, path, settled) for path in sites)
    return MethodRow(method, _touched(model, sites, config), len(sites), parameters)


def print_sites(name: str) -> None:
    """Prints both tables of one model."""
    model = empty_model(name)
    total = count_parameters(model)
    console = Console()
    console.print(f"{name}: {type(model).__name__}, {len(find_layers(model))} layers, {total:,} parameters")
    roles = make_table("roles", role="left", linear="left", sites="right", features="left")
    for row in role_rows(model):
        roles.add_row(row.role, ", ".join(row.names), str(row.sites), ", ".join(row.features))
    console.print(roles)
    methods = make_table(
        "methods", method="left", touches="left", sites="right", parameters="right", share="right"
    )
    for row in method_rows(model):
        share = f"{row.parameters / total:.3%}"
        methods.add_row(row.method, ", ".join(row.touches), str(row.sites), f"{row.parameters:,}", share)
    console.print(methods)


def _features(model: nn.Module, part: RolePart) -> str:
    inputs, outputs = layer_features(model, part.path)
    return f"{inputs} -> {outputs if part.features is None else f'{len(part.features)} of {outputs}'}"


def _touched(model: nn.Module, sites: Iterable[str], config: AdapterConfig) -> list[str]:
    """Roles in the order of `ROLES`, then other modules of the blocks by name, then linears outside of the blocks
    by their path."""
    trained = {path: trained_features(model, path, config) for path in sites}
    parts = find_parts(model)
    touched = {
        part.role for part in parts if part.path in trained and _is_trained(part.features, trained[part.path])
    }
    inside, blocks = set(block_linears(model)), tuple(f"{layer}." for layer in find_layers(model))
    inside |= {part.path for part in parts}
    others = [path for path in trained if path not in inside]
    names = _unique(last_name(path) if path.startswith(blocks) else path for path in others)
    return [*(role for role in ROLES if role in touched), *names]


def _is_trained(features: Tensor | None, trained: Tensor | None) -> bool:
    return features is None or trained is None or bool(torch.isin(features, trained).any())


def _unique(words: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(words))

"""What adapters would touch in a language model, known from its config alone."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from mmpeft.adapters import AdapterConfig, IA3Config, LoraConfig
from mmpeft.adapters.architecture import (
    ROLES,
    Part,
    find_blocks,
    find_layers,
    find_linears,
    find_parts,
    linear_features,
)
from mmpeft.adapters.sites import find_sites, is_feedforward, trained_features
from mmpeft.embedded import resolve

RANK = 16
"""LoRA's rank in the table."""
BOTTLENECK = 64
"""Inner width of the bottleneck adapters in the table: two linears with biases behind every feed-forward."""


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
        ValueError: an encoder-decoder model.
    """
    config = AutoConfig.from_pretrained(resolve(name))
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{name} is an encoder-decoder model ({config.model_type}); choose a decoder-only language model"
        )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def count_parameters(model: nn.Module) -> int:
    """All parameters, a tied head counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def role_rows(model: nn.Module) -> list[RoleRow]:
    """Roles in the order of `ROLES`; an ungated feed-forward has no gate.

    Raises:
        ValueError: a role that no linear plays, see `find_parts`.
    """
    linears, blocks = find_linears(model), find_blocks(model)
    find_parts(model)  # a role that is missing is an error here too
    rows = []
    for role in ROLES:
        mine = [(block, part) for block in blocks for part in block.parts if part.role == role]
        if mine:
            names = _unique(part.path.removeprefix(f"{block.path}.") for block, part in mine)
            features = _unique(_features(linears[part.path], part) for _, part in mine)
            rows.append(RoleRow(role, names, len(mine), features))
    return rows


def method_rows(model: nn.Module) -> list[MethodRow]:
    """What each method would touch by default, and how many numbers it would train."""
    linears = find_linears(model)
    rows = []
    for method, config in (
        (f"LoRA q and v, r={RANK}", LoraConfig(rank=RANK)),
        (f"LoRA all linears, r={RANK}", LoraConfig(rank=RANK, target_modules="all-linear")),
        ("IA3", IA3Config()),
    ):
        sites = find_sites(model, config)
        parameters = sum(num_parameters(model, path, config) for path in sites)
        rows.append(MethodRow(method, _touched(model, sites, config), len(sites), parameters))
    inside = block_linears(model)
    biases = sum(_sizes(linears[path])[1] for path in inside)
    rows.append(MethodRow("BitFit", _unique(part.role for part in find_parts(model)), len(inside), biases))
    widths = [_sizes(linears[part.path])[1] for part in find_parts(model, ["down"])]
    bottlenecks = sum(2 * BOTTLENECK * width + BOTTLENECK + width for width in widths)
    rows.append(MethodRow(f"bottleneck of {BOTTLENECK}", ["after down"], len(widths), bottlenecks))
    return rows


def block_linears(model: nn.Module) -> list[str]:
    """Paths of the linears inside the decoder layers."""
    layers = tuple(f"{layer}." for layer in find_layers(model))
    return [path for path in find_linears(model) if path.startswith(layers)]


def num_parameters(model: nn.Module, path: str, config: AdapterConfig) -> int:
    """How many numbers an adapter trains on the linear at ``path``."""
    inputs, outputs = _sizes(model.get_submodule(path))
    if isinstance(config, LoraConfig):
        return config.rank * (inputs + outputs)
    assert isinstance(config, IA3Config), f"no count for {type(config).__name__}"
    if is_feedforward(path, config):
        return inputs
    features = trained_features(model, path, config)
    return outputs if features is None else len(features)


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


def make_table(title: str, **columns: str) -> Table:
    """An empty table; ``columns`` are names and how they are justified."""
    table = Table(title=title, title_justify="left")
    for column, justify in columns.items():
        table.add_column(column, justify=justify)  # pyright: ignore[reportArgumentType]
    return table


def _features(linear: nn.Module, part: Part) -> str:
    inputs, outputs = _sizes(linear)
    return f"{inputs} -> {outputs if part.features is None else f'{len(part.features)} of {outputs}'}"


def _sizes(linear: nn.Module) -> tuple[int, int]:
    sizes = linear_features(linear)
    assert sizes is not None, f"{type(linear).__name__} is no linear"
    return sizes


def _touched(model: nn.Module, sites: Iterable[str], config: AdapterConfig) -> list[str]:
    """Roles in the order of `ROLES`, then linears outside of the blocks by their path."""
    trained = {path: trained_features(model, path, config) for path in sites}
    parts = find_parts(model)
    touched = {
        part.role for part in parts if part.path in trained and _is_trained(part.features, trained[part.path])
    }
    inside = set(block_linears(model))
    return [*(role for role in ROLES if role in touched), *(path for path in trained if path not in inside)]


def _is_trained(features: Tensor | None, trained: Tensor | None) -> bool:
    return features is None or trained is None or bool(torch.isin(features, trained).any())


def _unique(words: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(words))

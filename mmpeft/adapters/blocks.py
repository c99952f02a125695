"""One decoder layer taken apart: its attention or what mixes tokens instead, its feed-forward, the linears of both."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmpeft.adapters.experts import expert_features, projections
from mmpeft.adapters.roles import (
    MIXER_INPUTS,
    Role,
    Shapes,
    attention_roles,
    common_parent,
    find_feedforward,
    is_output,
    split_fused,
)
from mmpeft.errors import RefusedError

EXPERTS = ("experts", "shared_experts", "input_linear", "output_linear")
"""What a module is called that holds all experts in one tensor."""
ATTENTION: set[Role] = {"q", "k", "v", "o"}
FEEDFORWARD: set[Role] = {"gate", "up", "down"}


@dataclass(frozen=True, eq=False)
class RolePart:
    """The linear, or the features of a fused one, that plays a role in a block."""

    path: str
    role: Role
    features: Tensor | None = None
    """(n,) int64, ascending: the output features that belong to the role; None is all of them."""
    mixed_with: tuple[str, ...] = ()
    """What else is among those features, in an order that is not known."""


@dataclass(frozen=True, eq=False)
class Block:
    """One decoder layer."""

    number: int
    path: str
    attention: str | None
    """Path of the attention module; None where no attention was recognised."""
    feedforward: str | None
    """Path of the module whose output is the feed-forward's: its last linear where the block holds it itself (OPT);
    None where none was recognised."""
    parts: list[RolePart]
    """In the order of the modules."""
    mixer: str | None = None
    """Path of what mixes tokens in place of an attention, or beside it; it plays roles only where there is none."""
    experts: list[str] = field(default_factory=list)
    """Paths of the modules that hold all experts of a mixture in one tensor per projection, in a layout that is not
    known."""
    others: list[str] = field(default_factory=list)
    """Paths of the linears that play no role."""


def linear_features(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) features of a linear; None for any other module."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D":  # GPT-2's linear of transformers keeps its weight as (in, out)
        weight: Any = module.weight
        return tuple(weight.shape)
    return None


def text_config(model: nn.Module) -> Any:
    """The config of the part that reads text; None where a model has none."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def is_mixer_input(path: str) -> bool:
    return last_name(path) in MIXER_INPUTS


def take_apart(model: nn.Module, number: int, path: str, linears: dict[str, nn.Module]) -> Block:
    """The decoder layer at ``path``; ``linears`` are the model's, see `architecture.find_linears`.

    Raises:
        RefusedError: it has several attentions, or none but a cross-attention.
    """
    shapes: Shapes = {
        name.removeprefix(f"{path}."): features_of(linears[name])
        for name in linears
        if name.startswith(f"{path}.")
    }
    attention = _attention(list(shapes), path)
    mixer = _mixer(list(shapes))
    mixing = attention if attention is not None else mixer
    regions = [each for each in (attention, mixer) if each is not None]
    rest = {name: shape for name, shape in shapes.items() if not any(_inside(name, each) for each in regions)}
    hidden = getattr(text_config(model), "hidden_size", None)
    experts = packed_experts(model.get_submodule(path))
    feedforward = {} if hidden is None else find_feedforward(rest, hidden)
    parts: list[RolePart] = []
    for name in shapes:
        if name in feedforward:
            parts += _fused_feedforward(f"{path}.{name}", feedforward[name], shapes[name][1])
        elif mixing is not None and _inside(name, mixing):
            parts += _mixing_parts(model, path, name, shapes, mixing, attention is None)
    parts += [part for name in experts for part in _expert_parts(model, f"{path}.{name}")]
    placed = {part.path for part in parts}
    others = [full for name in shapes if (full := f"{path}.{name}") not in placed]
    whole = experts[0].rpartition(".")[0] if experts else _whole(feedforward)
    unknown = [f"{path}.{name}" for name in experts if not projections(model.get_submodule(f"{path}.{name}"))]
    at = [_join(path, child) for child in (attention, whole, mixer)]
    return Block(number, path, at[0], at[1], parts, at[2], unknown, others)


def _attention(names: list[str], path: str) -> str | None:
    """The module inside a block that holds its queries, keys, values and its last linear."""
    found: dict[str, list[str]] = {}
    for name in names:
        if attention_roles(name):
            found.setdefault(name.split(".", 1)[0] if "." in name else "", []).append(name)
    children = [child for child, own in found.items() if any("q" in attention_roles(n) for n in own)]
    if len(children) > 1 or any("cross" in child for child in children):
        what = "several modules that look like its attention" if len(children) > 1 else "no self-attention"
        raise RefusedError(
            f"{path} has {what} ({', '.join(sorted(children))}), such as cross-attention; "
            "name the linears that you mean in target_modules"
        )
    if not children:
        return None
    inner = common_parent(found[children[0]])
    outside = inner.rpartition(".")[0]
    has_output = any(_inside(name, inner) and is_output(name) for name in names)
    return inner if has_output or not outside else outside


def _mixer(names: list[str]) -> str | None:
    return next((common_parent([name]) for name in names if is_mixer_input(name)), None)


def _mixing_parts(
    model: nn.Module, path: str, name: str, shapes: Shapes, mixing: str | None, is_mixer: bool
) -> list[RolePart]:
    """The roles of one linear inside a block's attention or mixer."""
    full = f"{path}.{name}"
    if is_mixer and is_mixer_input(name):
        return [RolePart(full, role, mixed_with=("the mixer's own gates",)) for role in ("q", "k", "v")]
    roles = () if is_mixer else attention_roles(name)
    if not roles:
        return [RolePart(full, "o")] if is_output(name) and not roles else []
    if (latent := name.replace("_a_proj", "_b_proj").removesuffix("_with_mqa")) in shapes and latent != name:
        # The way into a latent; its features beyond those that the way out reads are the keys' rotated part.
        width, features = shapes[latent][0], shapes[name][1]
        return [RolePart(full, "k", torch.arange(width, features))] if features > width else []
    if len(roles) == 1:
        return [RolePart(full, roles[0])]
    outputs = [shapes[each][0] for each in shapes if _inside(each, mixing or "") and is_output(each)]
    split = split_fused(
        last_name(name),
        roles,
        shapes[name][1],
        outputs[0] if len(outputs) == 1 else None,
        model.get_submodule(full.rpartition(".")[0]),
        str(getattr(text_config(model), "model_type", None)),
    )
    if split is None:
        return [RolePart(full, role, mixed_with=tuple(r for r in roles if r != role)) for role in roles]
    return [RolePart(full, role, features) for role, features in split.items()]


def _expert_parts(model: nn.Module, path: str) -> list[RolePart]:
    module: Any = model.get_submodule(path)
    parts: list[RolePart] = []
    for name in projections(module):
        role: Role = "down" if name == "down_proj" else "up"
        if name == "gate_up_proj":
            index = torch.arange(expert_features(module, name)[2])
            gate, up = index.chunk(2) if module.is_concatenated else (index[::2], index[1::2])
            parts += [RolePart(f"{path}.{name}", "gate", gate), RolePart(f"{path}.{name}", "up", up)]
        else:
            parts.append(RolePart(f"{path}.{name}", role))
    return parts


def _fused_feedforward(path: str, roles: list[Role], features: int) -> list[RolePart]:
    if len(roles) == 1:
        return [RolePart(path, roles[0])]
    halves = torch.arange(features).chunk(len(roles))
    return [RolePart(path, role, half) for role, half in zip(roles, halves, strict=True)]


def _whole(feedforward: dict[str, list[Role]]) -> str | None:
    """The module whose output is the feed-forward's."""
    if not feedforward:
        return None
    last = next(name for name, roles in feedforward.items() if roles == ["down"])
    return common_parent(feedforward) or last


def packed_experts(block: nn.Module) -> list[str]:
    """Paths inside a block of the modules that hold all experts of a mixture in one tensor per projection."""
    return [
        path
        for path, module in block.named_modules()
        if any(parameter.dim() == 3 for parameter in module.parameters(recurse=False))
        and last_name(path) in EXPERTS
    ]


def _inside(name: str, parent: str) -> bool:
    return not parent or name.startswith(f"{parent}.")


def _join(path: str, child: str | None) -> str | None:
    return None if child is None else f"{path}.{child}" if child else path


def features_of(module: nn.Module) -> tuple[int, int]:
    features = linear_features(module)
    assert features is not None, f"{type(module).__name__} is no linear, but find_linears returned it"
    return features


def last_name(path: str) -> str:
    """What a module is called in its parent."""
    return path.rsplit(".", 1)[-1]

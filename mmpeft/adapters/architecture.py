"""Roles (q, k, v, o, gate, up, down): which linear of a decoder-only model plays which, read from its modules.

The roles are the factors of one block::

    attention      o(softmax(q k^T) v)
    feed-forward   down(act(gate x) * up x), or ungated down(act(up x))

Names and places tell the roles. Several roles can share one fused linear; then each has some of its output
features. Their order cannot be seen from outside, so it is known by name and family and tested numerically.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from mmpeft.errors import RefusedError

Role = Literal["q", "k", "v", "o", "gate", "up", "down"]
ROLES: tuple[Role, ...] = get_args(Role)

ATTENTION: dict[str, Role] = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "out_proj": "o",
    "c_proj": "o",
    "dense": "o",
}
"""Last names of an attention's linears."""
FEEDFORWARD: dict[str, Role] = {
    "gate_proj": "gate",
    "up_proj": "up",
    "fc1": "up",
    "c_fc": "up",
    "dense_h_to_4h": "up",
    "down_proj": "down",
    "fc2": "down",
    "c_proj": "down",
    "dense_4h_to_h": "down",
}
"""Last names of a feed-forward's linears."""
FUSED_QKV = ("qkv_proj", "c_attn", "query_key_value")
FUSED_GATE_UP = "gate_up_proj"

CONTIGUOUS = {("c_attn", "gpt2"), ("qkv_proj", "phi3")}
"""(name, family) of fused projections whose output features are all of q, then k, then v."""
GROUPED = {("query_key_value", family) for family in ("gpt_neox", "falcon", "bloom")}
"""... whose features come head by head: per key-value head its queries, its key, its value. One query per group
is GPT-NeoX's and Falcon-RW's interleaving, a single group Falcon-7B's multi-query attention."""


@dataclass(frozen=True, eq=False)
class RolePart:
    """The linear, or the features of a fused one, that plays a role in a block."""

    path: str
    role: Role
    features: Tensor | None = None
    """(n,) int64, ascending: the output features that belong to the role; None is all of them."""


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


def linear_features(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) features of a linear; None for any other module."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D":  # GPT-2's linear of transformers keeps its weight as (in, out)
        weight: Any = module.weight
        return tuple(weight.shape)
    return None


def find_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear of a model by its path; the output head does not count."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return {
        path: module
        for path, module in model.named_modules()
        if module is not head and linear_features(module)
    }


def find_layers(model: nn.Module) -> list[str]:
    """Paths of the decoder layers, in order: the members of the one outermost list of modules with linears.

    Raises:
        RefusedError: an encoder-decoder model, or one with no such list or with several.
    """
    name = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise RefusedError(
            f"{name} is an encoder-decoder model; roles are known for decoder-only language models alone: name "
            "its linears in target_modules, or choose a decoder-only base"
        )
    lists = list(_outermost_lists(model))
    if len(lists) != 1:
        found = ", ".join(path for path, _ in lists) or "none"
        raise RefusedError(
            f"{name} has no single list of decoder layers (found: {found}); give the decoder-only language "
            "model itself, without encoder or vision tower"
        )
    path, layers = lists[0]
    return [f"{path}.{number}" for number in range(len(layers))]


def block_linears(model: nn.Module) -> list[str]:
    """Paths of the linears inside the decoder layers."""
    layers = tuple(f"{layer}." for layer in find_layers(model))
    return [path for path in find_linears(model) if path.startswith(layers)]


def find_blocks(model: nn.Module) -> list[Block]:
    """The decoder layers with every part that is recognised.

    Raises:
        RefusedError: see `find_layers`; or a block with several attentions, or a fused projection of unknown layout.
    """
    linears = find_linears(model)
    return [_block(model, number, path, linears) for number, path in enumerate(find_layers(model))]


def find_parts(model: nn.Module, roles: Iterable[Role] = ROLES) -> list[RolePart]:
    """The parts that play one of ``roles``, block by block.

    Raises:
        RefusedError: a block lacks a role; an ungated feed-forward needs no gate. Or see `find_blocks`.
    """
    wanted = set(roles)
    parts: list[RolePart] = []
    for block in find_blocks(model):
        present = {part.role for part in block.parts}
        missing = sorted(wanted - present - {"gate"}, key=ROLES.index)
        if missing:
            inside = [path for path in find_linears(model) if path.startswith(f"{block.path}.")]
            found = ", ".join(path.removeprefix(f"{block.path}.") for path in inside)
            raise RefusedError(
                f"{type(model).__name__}: no linear of {block.path} is known to be {', '.join(missing)}; "
                f"its linears are {found}; name those that you mean in target_modules"
            )
        parts += [part for part in block.parts if part.role in wanted]
    return parts


def _outermost_lists(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    seen: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module) or path.startswith(seen):
            continue
        if all(any(map(linear_features, member.modules())) for member in module):
            seen += (f"{path}.",)
            yield path, module


def _block(model: nn.Module, number: int, path: str, linears: dict[str, nn.Module]) -> Block:
    names = [name.removeprefix(f"{path}.") for name in linears if name.startswith(f"{path}.")]
    attention = _child(
        [name for name in names if last_name(name) in ("q_proj", *FUSED_QKV)], "attention", path
    )
    in_attention = [name for name in names if attention and name.startswith(f"{attention}.")]
    others = [
        name
        for name in names
        if name not in in_attention and last_name(name) in (*FEEDFORWARD, FUSED_GATE_UP)
    ]
    if _has_packed_experts(model.get_submodule(path)):
        others = []
    feedforward = _child(
        [name for name in others if FEEDFORWARD.get(last_name(name)) == "down"], "feed-forward", path
    )
    parts: list[RolePart] = []
    for name in names:
        full, last = f"{path}.{name}", last_name(name)
        if name in in_attention and last in FUSED_QKV:
            parts += _split_qkv(model, full, f"{path}.{attention}", linears)
        elif name in in_attention and last in ATTENTION:
            parts.append(RolePart(full, ATTENTION[last]))
        elif name in others and last == FUSED_GATE_UP:
            half = _features(linears[full])[1] // 2
            parts += [
                RolePart(full, "gate", torch.arange(half)),
                RolePart(full, "up", torch.arange(half, 2 * half)),
            ]
        elif name in others:
            parts.append(RolePart(full, FEEDFORWARD[last]))
    absolute = [None if child is None else f"{path}.{child}" for child in (attention, feedforward)]
    return Block(number, path, absolute[0], absolute[1], parts)


def _child(names: Sequence[str], what: str, path: str) -> str | None:
    """The block's own member that holds all of these linears."""
    children = sorted({name.split(".", 1)[0] for name in names})
    if len(children) > 1:
        raise RefusedError(
            f"{path} has several modules that look like its {what} ({', '.join(children)}), such as cross-attention; "
            "name the linears that you mean in target_modules"
        )
    return children[0] if children else None


def _has_packed_experts(block: nn.Module) -> bool:
    """A mixture of experts whose experts are one tensor: whatever linears are beside them are not its
    feed-forward."""
    experts = [module for name, module in block.named_modules() if last_name(name) == "experts"]
    return any(not any(map(linear_features, module.modules())) for module in experts)


def _split_qkv(model: nn.Module, path: str, attention: str, linears: dict[str, nn.Module]) -> list[RolePart]:
    """q has as many features as the attention's last linear reads; k and v share the rest equally."""
    family = str(getattr(getattr(model, "config", None), "model_type", None))
    last = last_name(path)
    features = _features(linears[path])[1]
    outputs = [
        name for name in linears if name.startswith(f"{attention}.") and ATTENTION.get(last_name(name)) == "o"
    ]
    if (last, family) not in CONTIGUOUS | GROUPED or len(outputs) != 1:
        known = ", ".join(f"{name} of {family}" for name, family in sorted(CONTIGUOUS | GROUPED))
        raise RefusedError(
            f"{path} of {type(model).__name__} holds q, k and v in an order that is not known for the family "
            f"{family!r} (known: {known}); set target_modules to [{last!r}] to adapt all of it"
        )
    queries = _features(linears[outputs[0]])[0]
    keys = (features - queries) // 2
    index = torch.arange(features)
    if (last, family) in CONTIGUOUS:
        q, k, v = index.split([queries, keys, keys])
    else:
        head_dim = _head_dim(model.get_submodule(attention))
        groups = keys // head_dim
        heads = index.view(groups, -1, head_dim)
        q, k, v = (part.flatten() for part in heads.split([queries // keys, 1, 1], dim=1))
    return [RolePart(path, "q", q), RolePart(path, "k", k), RolePart(path, "v", v)]


def _head_dim(attention: nn.Module) -> int:
    sizes: list[Any] = [getattr(attention, name, None) for name in ("head_dim", "head_size")]
    return next(int(size) for size in sizes if size)


def _features(module: nn.Module) -> tuple[int, int]:
    features = linear_features(module)
    assert features is not None, f"{type(module).__name__} is no linear, but find_linears returned it"
    return features


def last_name(path: str) -> str:
    """What a module is called in its parent."""
    return path.rsplit(".", 1)[-1]

"""Roles (q, k, v, o, gate, up, down): which linear of a decoder-only model plays which, read from its modules.

The roles are the factors of one block::

    attention      o(softmax(q k^T) v)
    feed-forward   down(act(gate x) * up x), or ungated down(act(up x))

Names and shapes tell the roles, see `roles`. Several roles can share one fused linear; then each has some of its
output features. Their order cannot be seen from outside, so it is known by name and family and tested numerically.

Blocks of a hybrid differ: some mix tokens by an attention, some by a state space or a convolution, some consist of a
feed-forward alone. A role may be absent where the block is of a kind that has none; it must never be absent because
its linear was not recognised.
"""

from collections.abc import Iterable, Iterator

from torch import nn

from mmpeft.adapters.blocks import (
    ATTENTION,
    FEEDFORWARD,
    Block,
    RolePart,
    is_mixer_input,
    linear_features,
    take_apart,
)
from mmpeft.adapters.roles import ROLES, Role, attention_roles, is_plain
from mmpeft.errors import RefusedError


def find_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear of a model by its path; the output head does not count, nor do routers that are a linear by class
    but return their choice of experts."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    plain: dict[type, bool] = {}
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if module is head or not linear_features(module):
            continue
        if type(module) not in plain:
            plain[type(module)] = is_plain(module)
        if plain[type(module)]:
            found[path] = module
    return found


def find_layers(model: nn.Module) -> list[str]:
    """Paths of the decoder layers, in order: the members of the outermost list of modules with linears.

    In a model of several towers it is the list inside of its text decoder; of several lists there those whose members
    mix tokens, and of these the nearest to the decoder.

    Raises:
        RefusedError: an encoder-decoder model, or one with no such list or with several.
    """
    name = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise RefusedError(
            f"{name} is an encoder-decoder model; roles are known for decoder-only language models alone: name "
            "its linears in target_modules, or choose a decoder-only base"
        )
    lists = dict(_outermost_lists(model, _decoder_path(model)))
    lists = {path: layers for path, layers in lists.items() if any(map(_mixes_tokens, layers))} or lists
    nearest = min((path.count(".") for path in lists), default=0)
    lists = {path: layers for path, layers in lists.items() if path.count(".") == nearest}
    if len(lists) != 1:
        found = ", ".join(lists) or "none"
        raise RefusedError(
            f"{name} has no single list of decoder layers (found: {found}); give the decoder-only language "
            "model itself, without encoder or vision tower, or name its linears in target_modules"
        )
    [(path, layers)] = lists.items()
    return [f"{path}.{number}" for number in range(len(layers))]


def block_linears(model: nn.Module) -> list[str]:
    """Paths of the linears inside the decoder layers."""
    layers = tuple(f"{layer}." for layer in find_layers(model))
    return [path for path in find_linears(model) if path.startswith(layers)]


def find_blocks(model: nn.Module) -> list[Block]:
    """The decoder layers with every part that is recognised.

    Raises:
        RefusedError: see `find_layers`; or a block with several attentions.
    """
    linears = find_linears(model)
    return [take_apart(model, number, path, linears) for number, path in enumerate(find_layers(model))]


def find_parts(model: nn.Module, roles: Iterable[Role] = ROLES) -> list[RolePart]:
    """The parts that play one of ``roles``, block by block.

    Raises:
        RefusedError: a block lacks a role though it is of a kind that has it, or all do; an ungated feed-forward needs
            no gate. Or see `find_blocks`.
    """
    wanted = set(roles)
    blocks = find_blocks(model)
    everywhere = {part.role for block in blocks for part in block.parts}
    for block in blocks:
        present = {part.role for part in block.parts}
        absent = absent_roles(block) & everywhere | {"gate"}
        if block.experts:  # a shared expert beside them is not all of the feed-forward
            present -= FEEDFORWARD
        missing = sorted(wanted - present - absent, key=ROLES.index)
        if missing:
            raise RefusedError(_without_role(model, block, missing))
    return [part for block in blocks for part in block.parts if part.role in wanted]


def _without_role(model: nn.Module, block: Block, missing: list[Role]) -> str:
    inside = [path for path in find_linears(model) if path.startswith(f"{block.path}.")]
    found = ", ".join(path.removeprefix(f"{block.path}.") for path in inside)
    packed = [path.removeprefix(f"{block.path}.") for path in block.experts]
    beside = f"; the layout of its experts in {', '.join(packed)} is not known" if packed else ""
    return (
        f"{type(model).__name__}: no linear of {block.path} is known to be {', '.join(missing)}; "
        f"its linears are {found or '(it has none)'}{beside}; name those that you mean in target_modules"
    )


def absent_roles(block: Block) -> set[Role]:
    """Roles that a block of this kind does not have: nothing in it is left that could play them."""
    present = {part.role for part in block.parts}
    mixing = tuple(f"{path}." for path in (block.attention, block.mixer) if path)
    beside = [path for path in block.others if path.startswith(mixing)]
    absent: set[Role] = set()
    if len(beside) == len(block.others):
        if not present & ATTENTION:
            absent |= ATTENTION
        if not present & FEEDFORWARD and not block.experts:
            absent |= FEEDFORWARD
    if "q" in present and not present & {"k", "v"} and not beside:  # it reads those of an earlier block
        absent |= {"k", "v"}
    return absent


def _decoder_path(model: nn.Module) -> str:
    """Where the text decoder is in a model of several towers; "" where it is the model or no module of it."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None  # pyright: ignore
    if decoder is None or not any(True for _ in _outermost_lists(decoder, "")):
        return ""
    return next((path for path, module in model.named_modules() if module is decoder), "")


def _outermost_lists(model: nn.Module, under: str) -> Iterator[tuple[str, nn.ModuleList]]:
    seen: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if not path.startswith(f"{under}." if under else ""):
            continue
        if not isinstance(module, nn.ModuleList) or not len(module) or path.startswith(seen):
            continue
        if all(any(map(linear_features, member.modules())) for member in module):
            seen += (f"{path}.",)
            yield path, module


def _mixes_tokens(member: nn.Module) -> bool:
    names = [path for path, module in member.named_modules() if path and linear_features(module)]
    return any("q" in attention_roles(path) or is_mixer_input(path) for path in names)

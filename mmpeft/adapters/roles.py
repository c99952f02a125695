"""Roles by name and shape: what the linears of one decoder layer are called, and which of them fit together.

A name tells queries, keys and values in whatever spelling: ``q_proj``, ``query``, ``Wqkv``, ``kv_b_proj``. A
feed-forward is told by its shapes alone: one linear from an inner width back to the hidden size, and those that fill
that width.
"""

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

Role = Literal["q", "k", "v", "o", "gate", "up", "down"]
ROLES: tuple[Role, ...] = get_args(Role)
GROUPS: dict[str, tuple[Role, ...]] = {"attention": ("q", "k", "v", "o"), "mlp": ("gate", "up", "down")}
"""What several roles are called together."""
Shapes = dict[str, tuple[int, int]]
"""Path inside a block -> (in, out) features, in the order of the modules."""

WORDS = {"query": "q", "key": "k", "value": "v"}
FUSED_ATTENTION = "c_attn"
"""GPT-2's name of all three, which spells none of them."""
OUTPUT_WORDS = {"o", "out", "output", "dense", "wo"}
"""Words of an attention's last linear; GPT-2 calls it c_proj."""
MIXER_INPUTS = ("in_proj", "linear_x")
"""What a state space, a short convolution or a gated recurrence is called that mixes tokens in place of an attention.
Mamba-2's in_proj writes C, B and x, which are the q, k and v of its dual form (Dao and Gu 2024, section 7)."""
BESIDE = ("indexer", "compressor", "forget_gate")
"""Parts of an attention with queries and keys that only choose what the attention itself looks at."""

CONTIGUOUS = {
    *(("c_attn", family) for family in ("gpt2", "openai-gpt", "gpt_bigcode")),
    *(("qkv_proj", family) for family in ("phi3", "phi4_multimodal")),
    ("Wqkv", "mpt"),
}
"""(name, family) of fused projections whose output features are all of q, then k, then v."""
GROUPED = {
    *(("query_key_value", f) for f in ("gpt_neox", "gpt_neox_japanese", "falcon", "bloom", "persimmon")),
    ("qkv_proj", "minimax"),
}
"""... whose features come head by head: per key-value head its queries, its key, its value. One query per group
is GPT-NeoX's and Falcon-RW's interleaving, a single group Falcon-7B's multi-query attention."""


def roles_called(targets: str | list[str]) -> tuple[Role, ...] | None:
    """The roles that ``target_modules`` means by a word: one of `GROUPS`, or roles with "+" between them, as "gate+up";
    None where it means something else."""
    if not isinstance(targets, str):
        return None
    if targets in GROUPS:
        return GROUPS[targets]
    named = targets.split("+")
    return tuple(role for role in ROLES if role in named) if {*named} <= {*ROLES} else None


def attention_roles(path: str) -> tuple[Role, ...]:
    """Which of q, k and v the linear at ``path`` inside a block is called; none for any other."""
    parts = path.split(".")
    if any(part in BESIDE for part in parts):
        return ()
    name = parts[-2] if parts[-1] == "linear" and len(parts) > 1 else parts[-1]
    if name == FUSED_ATTENTION:
        return ("q", "k", "v")
    found = {letter for word in _words(name) for letter in _letters(word)}
    return tuple(role for role in ("q", "k", "v") if role in found)


def is_output(path: str) -> bool:
    """Whether a linear of an attention is called as its last one."""
    parts = path.split(".")
    name = parts[-2] if parts[-1] == "linear" and len(parts) > 1 else parts[-1]
    words = set(_words(name))
    return name == "c_proj" or (bool(words & OUTPUT_WORDS) and "gate" not in words)


def common_parent(paths: Iterable[str]) -> str:
    """The innermost module that holds all of these; "" is the block itself."""
    parents = [path.split(".")[:-1] for path in paths]
    levels = zip(*parents, strict=False)
    return ".".join(level[0] for level in takewhile(lambda level: len({*level}) == 1, levels))


def find_feedforward(shapes: Shapes, hidden: int) -> dict[str, list[Role]]:
    """Path -> roles of the linears of a feed-forward, the fused one's in the order of its halves.

    A linear from some inner width to ``hidden`` is *down*, those from ``hidden`` to that width, or to twice as much,
    *gate* and *up*, and the widest such group is the feed-forward: low-rank helpers beside it are narrower. Of two
    that fill it the gate is the one called so, else the first, and the gate is the first half of a fused one, in all
    families.
    """
    inner = [
        width
        for width, out in shapes.values()
        if out == hidden != width and {(hidden, width), (hidden, 2 * width)} & set(shapes.values())
    ]
    if not inner:
        return {}
    roles: dict[str, list[Role]] = {}
    singles = [path for path, shape in shapes.items() if shape == (hidden, max(inner))]
    for path, shape in shapes.items():
        if shape == (max(inner), hidden):
            roles[path] = ["down"]
        elif shape == (hidden, 2 * max(inner)):
            roles[path] = ["gate", "up"]
        elif shape == (hidden, max(inner)):
            own = [each for each in singles if common_parent([each]) == common_parent([path])]
            gates = [each for each in own if "gate" in each.rsplit(".", 1)[-1]] or own[:1]
            roles[path] = ["gate" if len(own) > 1 and path in gates else "up"]
    return roles


def split_fused(
    name: str, roles: Sequence[Role], features: int, queries: int | None, attention: Any, family: str
) -> dict[Role, Tensor] | None:
    """The output features of each role in a fused projection; None where their order is not known.

    Args:
        name: of the linear.
        roles: that it holds.
        features: it writes.
        queries: features that the attention's last linear reads, where there is one.
        attention: the module that holds the linear, for the sizes of its heads.
        family: the model's type.
    """
    index = torch.arange(features)
    if tuple(roles) == ("k", "v") and hasattr(attention, "qk_nope_head_dim"):  # latent attention: by heads
        sizes = [attention.qk_nope_head_dim, attention.v_head_dim]
        return _by_heads(index, ("k", "v"), sizes)
    if name == "in_proj_qkv" and hasattr(attention, "key_dim"):  # gated delta nets
        split = index.split([attention.key_dim, attention.key_dim, attention.value_dim])
        return dict(zip(("q", "k", "v"), split, strict=True))
    if name == "in_proj_qkvz" and hasattr(attention, "head_k_dim"):
        values = attention.num_v_heads // attention.num_k_heads * attention.head_v_dim
        return _by_heads(index, ("q", "k", "v"), [attention.head_k_dim, attention.head_k_dim, values, values])
    if queries is None or tuple(roles) != ("q", "k", "v"):
        return None
    keys = (features - queries) // 2
    if (name, family) in CONTIGUOUS and getattr(attention, "multi_query", True):
        return dict(zip(("q", "k", "v"), index.split([queries, keys, keys]), strict=True))
    if (name, family) in GROUPED or (name, family) == ("c_attn", "gpt_bigcode"):
        head = next(int(size) for n in ("head_dim", "head_size") if (size := getattr(attention, n, None)))
        return _by_heads(index, ("q", "k", "v"), [queries // keys * head, head, head])
    return None


def _by_heads(index: Tensor, roles: Sequence[Role], sizes: Sequence[int]) -> dict[Role, Tensor]:
    parts = index.view(-1, sum(sizes)).split(list(sizes), dim=1)
    return {role: part.flatten() for role, part in zip(roles, parts, strict=False)}


def _words(name: str) -> list[str]:
    """``kv_a_proj`` -> kv, a, proj; ``Wqkv`` -> wqkv."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)]


def _letters(word: str) -> str:
    letters = WORDS.get(word, word.removeprefix("w"))
    return letters if set(letters) <= set("qkvz") else ""


def is_plain(linear: nn.Module) -> bool:
    """Whether a linear of a class of its own maps (..., I) to (..., O) as any other: routers return more, grouped ones
    read less."""
    kind = type(linear)
    if kind.forward is nn.Linear.forward or not kind.__module__.startswith("transformers.models."):
        return True
    weight: Any = linear.weight
    try:
        out = kind.forward(
            _without_numbers(linear), torch.zeros(2, weight.shape[1], dtype=weight.dtype, device="meta")
        )
    except (RuntimeError, ValueError, TypeError):
        return False
    return isinstance(out, Tensor) and out.shape == (2, weight.shape[0])


def _without_numbers(linear: nn.Module) -> Any:
    """A linear that computes shapes: the numbers may lie in several processes, of which this one has a part."""
    bare: Any = copy.copy(linear)
    bare._parameters, bare._buffers = _shapes(linear._parameters), _shapes(linear._buffers)
    return bare


def _shapes(held: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {
        name: None if own is None else torch.empty(own.shape, dtype=own.dtype, device="meta")
        for name, own in held.items()
    }

"""Which linears of a language model an adapter goes to."""

import difflib
import math
import re
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor, nn

from mmpeft.adapters.architecture import (
    FEEDFORWARD,
    FUSED_QKV,
    Role,
    find_layers,
    find_linears,
    find_parts,
    linear_features,
)
from mmpeft.adapters.ia3 import IA3Config
from mmpeft.adapters.stack import AdapterConfig

__all__ = [
    "choose_layers",
    "find_sites",
    "is_feedforward",
    "linear_features",
    "names_module",
    "trained_features",
]

ATTENTION_QV: tuple[Role, ...] = ("q", "v")
"""LoRA's default places (Hu et al., table 5)."""
KEYS_VALUES_FEEDFORWARD: tuple[Role, ...] = ("k", "v", "down")
"""IA3's places (Liu et al., section 3.3); the last linear's input is the feed-forward's inner activation."""
FEEDFORWARD_OUT = [
    f"mlp.{name}" if name == "c_proj" else name for name, role in FEEDFORWARD.items() if role == "down"
]
"""Names of the feed-forward's last linear, where IA3 scales the input. GPT-2 calls the attention's c_proj too."""


def find_sites(
    model: nn.Module, config: AdapterConfig, layers: list[int] | str | None = None
) -> dict[str, nn.Module]:
    """The linears that ``config.target_modules`` names, by their path in ``model``.

    Args:
        layers: only those inside these decoder layers, see `choose_layers`.

    Raises:
        ValueError: a name matches nothing (the message has the closest names of this model), "auto" finds no
            linear for a role, or the layers are not there.
    """
    linears = find_linears(model)
    targets = config.target_modules
    if targets == "all-linear":
        sites = linears
    elif targets == "auto":
        chosen = {part.path for part in find_parts(model, _roles(config))}
        sites = {path: module for path, module in linears.items() if path in chosen}
    else:
        sites = _chosen(model, linears, "target_modules", targets)
    if isinstance(config, IA3Config) and config.feedforward_modules not in ("auto", []):
        _chosen(model, sites, "feedforward_modules", config.feedforward_modules)
    return sites if layers is None else _inside(model, sites, layers)


def trained_features(model: nn.Module, path: str, config: AdapterConfig) -> Tensor | None:
    """The output features of the linear at ``path`` that IA3's output vector may change.

    By default IA3 rescales keys and values: of a fused projection only their features, where PEFT's default
    rescales the queries too. Whoever names the fused linear in ``target_modules`` means all of it, as in PEFT.

    Returns:
        (n,) int64, ascending; None is all of them.
    """
    fused = path.rsplit(".", 1)[-1] in FUSED_QKV
    if not (fused and isinstance(config, IA3Config) and config.target_modules == "auto"):
        return None
    parts = [part.features for part in find_parts(model, _roles(config)) if part.path == path]
    return torch.cat([features for features in parts if features is not None]).sort().values


def choose_layers(num_layers: int, layers: Sequence[int] | str | None) -> list[int]:
    """Numbers of the chosen decoder layers, ascending.

    ``None`` is all of them. A list counts from 0, or from the end where negative. ``"8-15"`` has both ends,
    ``"8:"``, ``":8"`` and ``"8:16"`` are Python's slices. ``"last 50%"``, ``"first 25%"`` and ``"middle 1/3"`` are
    shares, rounded to the nearest layer and at least one.

    Raises:
        ValueError: a layer that is not there, the same one twice, or a word that is none of these.
    """
    if layers is None:
        return list(range(num_layers))
    if isinstance(layers, str):
        return _by_words(num_layers, layers.strip())
    wrong = [
        n
        for n in layers
        if isinstance(n, bool) or not isinstance(n, int) or not -num_layers <= n < num_layers
    ]
    if wrong or not layers:
        raise ValueError(
            f"layers {list(layers)!r}: {wrong or 'nothing'} names no layer; the model has {num_layers}, numbered "
            f"0 to {num_layers - 1}, or -{num_layers} to -1 from the end"
        )
    chosen = sorted(n % num_layers for n in layers)
    if len(set(chosen)) < len(chosen):
        raise ValueError(
            f"layers {list(layers)!r} names a layer twice in a model of {num_layers}; name each once"
        )
    return chosen


def is_feedforward(path: str, config: IA3Config) -> bool:
    """Whether IA3 scales this site's input rather than its output."""
    modules = FEEDFORWARD_OUT if config.feedforward_modules == "auto" else config.feedforward_modules
    return names_module(path, modules)


def names_module(path: str, names: str | list[str]) -> bool:
    """PEFT's rule: a list names modules by their path or the end of it, a string is a pattern for the whole
    path."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def _roles(config: AdapterConfig) -> tuple[Role, ...]:
    return KEYS_VALUES_FEEDFORWARD if isinstance(config, IA3Config) else ATTENTION_QV


def _inside(
    model: nn.Module, sites: dict[str, nn.Module], layers: Sequence[int] | str
) -> dict[str, nn.Module]:
    paths = find_layers(model)
    prefixes = tuple(f"{paths[number]}." for number in choose_layers(len(paths), layers))
    kept = {path: module for path, module in sites.items() if path.startswith(prefixes)}
    if not kept:
        raise ValueError(
            f"layers {layers!r} leaves none of the {len(sites)} linears that target_modules names in "
            f"{type(model).__name__}; the first is {next(iter(sites))}"
        )
    return kept


def _by_words(num_layers: int, words: str) -> list[int]:
    if match := re.fullmatch(r"(\d+)\s*-\s*(\d+)", words):
        first, stop = int(match[1]), int(match[2]) + 1
    elif match := re.fullmatch(r"(\d*):(\d*)", words):
        first, stop = int(match[1] or 0), int(match[2] or num_layers)
    elif match := re.fullmatch(
        r"(first|middle|last)\s+(?:(\d+(?:\.\d+)?)\s*%|(\d+)\s*/\s*([1-9]\d*))", words
    ):
        share = Fraction(match[2]) / 100 if match[2] else Fraction(int(match[3]), int(match[4]))
        if not 0 < share <= 1:
            raise ValueError(f"layers {words!r}: a share must be above 0 and at most 100% or 1/1")
        count = max(1, math.floor(share * num_layers + Fraction(1, 2)))
        first = {"first": 0, "middle": (num_layers - count) // 2, "last": num_layers - count}[match[1]]
        stop = first + count
    else:
        raise ValueError(
            f"layers {words!r} is not understood; write a list such as [0, 1, -1], a range such as '8-15' or '8:', "
            "or a share such as 'last 50%', 'first 25%' or 'middle 1/3'"
        )
    if not 0 <= first < stop <= num_layers:
        raise ValueError(
            f"layers {words!r} names layers {first} to {stop - 1}; the model has {num_layers}, numbered 0 to "
            f"{num_layers - 1}"
        )
    return list(range(first, stop))


def _check_pattern(field: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{field} {pattern!r} is not a valid pattern: {error}") from None


def _chosen(
    model: nn.Module, linears: dict[str, nn.Module], field: str, names: str | list[str]
) -> dict[str, nn.Module]:
    alternatives = [names] if isinstance(names, str) else [[name] for name in names]
    for pattern in alternatives:
        if isinstance(pattern, str):
            _check_pattern(field, pattern)
    unmatched = [each for each in alternatives if not any(names_module(path, each) for path in linears)]
    if unmatched or not names:
        wrong = [each if isinstance(each, str) else each[0] for each in unmatched]
        known = sorted({path.rsplit(".", 1)[-1] for path in linears})
        closest = sorted({hit for name in wrong for hit in difflib.get_close_matches(name, known, n=1)})
        hint = f"closest: {', '.join(map(repr, closest))}; " if closest else ""
        raise ValueError(
            f"{field} {wrong or names!r} matched no linear of {type(model).__name__}; {hint}"
            f"its linears are called {', '.join(known) or '(it has none)'}"
        )
    return {path: module for path, module in linears.items() if names_module(path, names)}

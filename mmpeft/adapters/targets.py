"""Target modules: which layers of a language model an adapter goes to, and the sizes of what it reads."""

import difflib
import math
import re
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmpeft.adapters.architecture import (
    FUSED_QKV,
    find_blocks,
    find_layers,
    find_linears,
    find_parts,
    last_name,
    linear_features,
)
from mmpeft.adapters.methods.base import AdapterConfig, Beyond, ModelInputs, names_module
from mmpeft.errors import RefusedError


def find_sites(model: nn.Module, config: AdapterConfig) -> dict[str, nn.Module]:
    """The layers that ``config`` names by ``target_modules`` and ``layers``, by their path in ``model``.

    Raises:
        RefusedError: a name matches nothing (the message has the closest names of this model), "auto" finds no
            linear for a role, or the decoder layers are not there.
    """
    linears = find_linears(model)
    targets = config.target_modules
    if config.whole_feedforwards:
        whole = _feedforwards(model, needed=targets == "auto")
        sites = whole if targets == "auto" else _targeted(model, linears | whole, linears, targets)
    elif targets == "auto":
        chosen = {part.path for part in find_parts(model, config.auto)}
        sites = {path: module for path, module in linears.items() if path in chosen}
    else:
        sites = _targeted(model, linears | further_layers(model, config.beyond, targets), linears, targets)
    for field in config.fields_of_targets:
        if getattr(config, field) not in ("auto", []):
            _chosen(model, sites, field, getattr(config, field))
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
        if any(module is each for each in wanted) or (norms and _is_norm(module))
    }


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 1 and linear_features(module) is None


def refuse_head(model: Any, sites: Sequence[str], image_shape: tuple[int, int] | None) -> None:
    """Raises:
    RefusedError: an adapter of the output head in a model that computes logits of single positions, whose rows
        nobody can tell.
    """
    if image_shape is None:
        return
    for path in further_layers(model, ("head",), ""):
        if path in sites:
            raise RefusedError(
                f"{path} is the output head, which a MultimodalModel calls for single positions of its rows: serve an "
                "adapter there by an AdapterBank on the language model itself, or apply it in PEFT, by "
                "merge_and_unload, and take the model that this makes as base"
            )


def _targeted(
    model: nn.Module, layers: dict[str, nn.Module], linears: dict[str, nn.Module], targets: str | list[str]
) -> dict[str, nn.Module]:
    return linears if targets == "all-linear" else _chosen(model, layers, "target_modules", targets)


def _feedforwards(model: nn.Module, needed: bool) -> dict[str, nn.Module]:
    """The whole feed-forward of every block; with ``needed``, a block without one is an error."""
    try:
        blocks = find_blocks(model)
    except ValueError:
        if needed:
            raise
        return {}
    missing = [block.path for block in blocks if block.feedforward is None]
    if missing and needed:
        raise RefusedError(
            f"{type(model).__name__}: no feed-forward was recognised in {missing[0]}; name the layers that you mean "
            "in target_modules"
        )
    return {path: model.get_submodule(path) for block in blocks if (path := block.feedforward)}


def trained_features(model: nn.Module, path: str, config: AdapterConfig) -> Tensor | None:
    """The output features of the linear at ``path`` that train: of a fused projection those of
    `AdapterConfig.trained_roles`.

    Returns:
        (n,) int64, ascending; None is all of them.
    """
    fused = last_name(path) in FUSED_QKV
    roles = config.trained_roles(path) if fused else None
    if roles is None:
        return None
    parts = [part.features for part in find_parts(model, roles) if part.path == path]
    return torch.cat([features for features in parts if features is not None]).sort().values


def choose_layers(num_layers: int, layers: Sequence[int] | str | None) -> list[int]:
    """Numbers of the chosen decoder layers, ascending.

    ``None`` is all of them. A list counts from 0, or from the end where negative. ``"8-15"`` has both ends,
    ``"8:"``, ``":8"`` and ``"8:16"`` are Python's slices. ``"last 50%"``, ``"first 25%"`` and ``"middle 1/3"`` are
    shares, rounded to the nearest layer and at least one.

    Raises:
        RefusedError: a layer that is not there, the same one twice, or a word that is none of these.
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
        raise RefusedError(
            f"layers {list(layers)!r}: {wrong or 'nothing'} names no layer; the model has {num_layers}, numbered "
            f"0 to {num_layers - 1}, or -{num_layers} to -1 from the end"
        )
    chosen = sorted(n % num_layers for n in layers)
    if len(set(chosen)) < len(chosen):
        raise RefusedError(
            f"layers {list(layers)!r} names a layer twice in a model of {num_layers}; name each once"
        )
    return chosen


def layer_features(model: nn.Module, path: str) -> tuple[int, int]:
    """(in, out) features of a layer: a linear's own, (tokens, hidden size) of an embedding, a norm's on both sides, and
    the hidden size on both sides for a whole feed-forward."""
    module = model.get_submodule(path)
    if features := linear_features(module):
        return features
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if _is_norm(module):
        size = cast(Tensor, module.weight).shape[0]
        return size, size
    hidden = _hidden_size(model)
    return hidden, hidden


def num_parameters(model: nn.Module, path: str, config: AdapterConfig) -> int:
    """How many numbers an adapter trains on the layer at ``path``."""
    in_features, out_features = layer_features(model, path)
    numbers = sum(map(math.prod, config.shapes(path, in_features, out_features).values()))
    features = trained_features(model, path, config)
    return numbers if features is None else numbers * len(features) // out_features


def gets_flattened(model: Any, path: str) -> bool:
    """Whether the layer at ``path`` gets (rows * tokens, features): OPT's feed-forward and its norm do."""
    return getattr(getattr(model, "config", None), "model_type", None) == "opt" and path.endswith(
        (".fc1", ".fc2", ".final_layer_norm")
    )


def model_inputs(model: Any, image_shape: tuple[int, int] | None) -> ModelInputs:
    """The sizes of what a language model of transformers reads, by its config.

    Args:
        image_shape: (tokens, dim) of one image's features, where the model reads images.
    """
    config = model.config
    return ModelInputs(
        hidden_size=_hidden_size(model),
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_key_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        image_shape=image_shape,
    )


def require_reader(configs: Iterable[AdapterConfig], image_shape: tuple[int, int] | None) -> None:
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
    return model.get_input_embeddings().weight.shape[1]


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
            raise RefusedError(f"layers {words!r}: a share must be above 0 and at most 100% or 1/1")
        count = max(1, math.floor(share * num_layers + Fraction(1, 2)))
        first = {"first": 0, "middle": (num_layers - count) // 2, "last": num_layers - count}[match[1]]
        stop = first + count
    else:
        raise RefusedError(
            f"layers {words!r} is not understood; write a list such as [0, 1, -1], a range such as '8-15' or '8:', "
            "or a share such as 'last 50%', 'first 25%' or 'middle 1/3'"
        )
    if not 0 <= first < stop <= num_layers:
        raise RefusedError(
            f"layers {words!r} names layers {first} to {stop - 1}; the model has {num_layers}, numbered 0 to "
            f"{num_layers - 1}"
        )
    return list(range(first, stop))


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

"""Which linears of a language model an adapter goes to."""

import difflib
import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from mmpeft.adapters.ia3 import IA3Config
from mmpeft.adapters.layer import AdapterLayer
from mmpeft.adapters.stack import AdapterConfig, names_module

AUTO = {
    "ia3": ["k_proj", "v_proj", "down_proj"],
    "bottleneck": ["mlp"],
    "full": "all-linear",
    "bitfit": "all-linear",
    "lora": ["q_proj", "v_proj"],
    "dora": ["q_proj", "v_proj"],
}
"""Method -> its places where the config says "auto"."""


def linear_features(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) features of a linear; None for any other module."""
    if isinstance(module, AdapterLayer):
        return linear_features(module.base)
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D":  # GPT-2's linear of transformers keeps its weight as (in, out)
        rows, columns = module.weight.shape  # pyright: ignore[reportCallIssue, reportGeneralTypeIssues]
        return int(rows), int(columns)
    return None


def find_sites(model: nn.Module, config: AdapterConfig) -> dict[str, nn.Module]:
    """The layers that ``config.target_modules`` names, by their path in ``model``.

    Raises:
        ValueError: a name matches nothing; the message has the closest names of this model.
    """
    layers = dict(_adaptable(model, config))
    targets = AUTO[config.method] if config.target_modules == "auto" else config.target_modules
    if targets == "all-linear":
        return {path: module for path, module in layers.items() if linear_features(module)}
    sites = _chosen(model, layers, "target_modules", targets)
    if isinstance(config, IA3Config) and config.feedforward_modules not in ("auto", []):
        _chosen(model, sites, "feedforward_modules", config.feedforward_modules)
    return sites


def submodule(model: nn.Module, path: str) -> Any:
    """The module at a path of the model as it was before layers were wrapped."""
    module: Any = model
    for name in path.split(".") if path else []:
        if isinstance(module, AdapterLayer) and not hasattr(module, name):
            module = module.base
        module = getattr(module, name)
    return module


def layer_features(model: nn.Module, path: str) -> tuple[int, int]:
    """(in, out) features of a layer: a linear's own, the hidden size on both sides for a whole feed-forward."""
    return linear_features(submodule(model, path)) or (_hidden_size(model),) * 2


def input_features(model: Any, config: AdapterConfig, image_shape: tuple[int, int] | None) -> tuple[int, int]:
    """What a method that changes the model's inputs counts as (in, out) features.

    Raises:
        ValueError: an image prompt for a model that reads no images.
    """
    if config.method == "image_prompt":
        if image_shape is None:
            raise ValueError("image prompts need a model that reads images; this is a language model alone")
        return image_shape
    hidden = _hidden_size(model)
    if config.method == "prefix":
        layers, heads, head_dim = attention_shape(model)
        return hidden, layers * 2 * heads * head_dim
    return hidden, hidden


def attention_shape(model: Any) -> tuple[int, int, int]:
    """(layers, key heads, head dim) of a language model of transformers, by its config."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, heads, head_dim


def _hidden_size(model: Any) -> int:
    return model.get_input_embeddings().weight.shape[1]


def named_layers(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """Every module by the path it has in the model without adapters; a wrapped one is its `AdapterLayer`."""

    def walk(module: nn.Module, path: str) -> Iterable[tuple[str, nn.Module]]:
        yield path, module
        inner = module.base if isinstance(module, AdapterLayer) else module
        for name, child in inner.named_children():
            yield from walk(child, f"{path}.{name}" if path else name)

    return walk(model, "")


def _adaptable(model: nn.Module, config: AdapterConfig) -> Iterable[tuple[str, nn.Module]]:
    """Every linear inside the model's blocks, not the output head; for bottlenecks the whole feed-forwards too."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # pyright: ignore
    for path, module in named_layers(model):
        feedforward = config.method == "bottleneck" and path.endswith(".mlp")
        if module is not head and (linear_features(module) or feedforward):
            yield path, module


def _check_pattern(field: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{field} {pattern!r} is not a valid pattern: {error}") from None


def _chosen(
    model: nn.Module, layers: dict[str, nn.Module], field: str, names: str | list[str]
) -> dict[str, nn.Module]:
    alternatives = [names] if isinstance(names, str) else [[name] for name in names]
    for pattern in alternatives:
        if isinstance(pattern, str):
            _check_pattern(field, pattern)
    unmatched = [each for each in alternatives if not any(names_module(path, each) for path in layers)]
    if unmatched or not names:
        wrong = [each if isinstance(each, str) else each[0] for each in unmatched]
        known = sorted({path.rsplit(".", 1)[-1] for path in layers})
        closest = sorted({hit for name in wrong for hit in difflib.get_close_matches(name, known, n=1)})
        hint = f"closest: {', '.join(map(repr, closest))}; " if closest else ""
        raise ValueError(
            f"{field} {wrong or names!r} matched no linear of {type(model).__name__}; {hint}"
            f"its linears are called {', '.join(known) or '(it has none)'}"
        )
    return {path: module for path, module in layers.items() if names_module(path, names)}

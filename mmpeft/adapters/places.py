"""What an adapter has at one place of a model: its stack, the shapes of a slot, and the adapted layer under it."""

import math
from typing import Any

from torch import nn

from mmpeft.adapters.experts import AdaptedProjection, adapt_projection, expert_features, split_path
from mmpeft.adapters.layer import AdaptedForward
from mmpeft.adapters.methods.base import AdapterConfig
from mmpeft.adapters.methods.stack import Stack
from mmpeft.adapters.routing import Routing
from mmpeft.adapters.targets import layer_features, trained_features


def tensor_shapes(model: nn.Module, path: str, config: AdapterConfig) -> dict[str, list[int]]:
    """Name -> shape of what a slot of this config has on the layer at ``path``."""
    if experts := split_path(model, path):
        return config.expert_shapes(path, *expert_features(*experts))
    return config.shapes(path, *layer_features(model, path))


def num_parameters(model: nn.Module, path: str, config: AdapterConfig) -> int:
    """How many numbers an adapter trains on the layer at ``path``."""
    numbers = sum(map(math.prod, tensor_shapes(model, path, config).values()))
    features = trained_features(model, path, config)
    return numbers if features is None else numbers * len(features) // layer_features(model, path)[1]


def make_stack(model: nn.Module, path: str, config: AdapterConfig, num_slots: int, size: int) -> Stack:
    """An empty stack for the layer at ``path``."""
    if experts := split_path(model, path):
        return config.make_experts_stack(path, *expert_features(*experts), num_slots, size)
    return config.make_stack(path, *layer_features(model, path), num_slots, size)


def adapt_layer(model: nn.Module, path: str, routing: Routing) -> AdaptedForward | AdaptedProjection:
    """Replaces the forward of the layer at ``path``."""
    if experts := split_path(model, path):
        return adapt_projection(*experts, routing)
    in_features, _ = layer_features(model, path)
    return AdaptedForward(model.get_submodule(path), in_features, routing, gets_flattened(model, path))


def gets_flattened(model: Any, path: str) -> bool:
    """Whether the layer at ``path`` gets (rows * tokens, features), row by row: OPT's feed-forward and its norm do, and
    what sits beside the experts of a mixture."""
    if getattr(getattr(model, "config", None), "model_type", None) == "opt" and path.endswith(
        (".fc1", ".fc2", ".final_layer_norm")
    ):
        return True
    if "router" in path.split("."):
        return True
    parents = [path.rsplit(".", count)[0] for count in range(1, path.count(".") + 1)]
    return any(hasattr(model.get_submodule(parent), "experts") for parent in parents)

"""Puts an adapted layer in the place of a layer."""

from torch import nn

from mmpeft.adapters.layer import AdapterLayer, Routing
from mmpeft.adapters.targets import base_of, gets_flattened, layer_features, submodule


def wrap_layer(model: nn.Module, path: str, routing: Routing) -> AdapterLayer:
    """Replaces the layer at ``path`` by an `AdapterLayer` around it, in place.

    Wrapping was chosen over hooks (compilation skips their guards), parametrisation (it reads the dense
    weight, which a 4-bit linear does not have) and subclassing (one class per quantiser).
    """
    parent_path, _, child = path.rpartition(".")
    parent = base_of(submodule(model, parent_path))
    base = getattr(parent, child)
    layer = AdapterLayer(base, *layer_features(model, path), routing, gets_flattened(model, path))
    layer.train(base.training)
    setattr(parent, child, layer)
    return layer

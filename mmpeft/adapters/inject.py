"""Puts an adapted linear in the place of a linear."""

from torch import nn

from mmpeft.adapters.linear import AdapterLinear, Routing
from mmpeft.adapters.sites import linear_features


def wrap_linear(model: nn.Module, path: str, routing: Routing) -> AdapterLinear:
    """Replaces the linear at ``path`` by an `AdapterLinear` around it, in place.

    Wrapping was chosen over hooks (compilation skips their guards), parametrisation (it reads the dense
    weight, which a 4-bit linear does not have) and subclassing (one class per quantiser).
    """
    parent_path, _, child = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    base = getattr(parent, child)
    features = linear_features(base)
    assert features is not None, f"{path} is a {type(base).__name__}, which find_sites never returns"
    layer = AdapterLinear(base, *features, routing)
    layer.train(base.training)
    setattr(parent, child, layer)
    return layer

"""The sizes of what a language model reads, embeddings and the keys and values of its layers, by its modules."""

from typing import Any

from torch import nn

from mmpeft.adapters.architecture import find_blocks
from mmpeft.adapters.blocks import Block, features_of, text_config
from mmpeft.adapters.methods.base import ModelInputs
from mmpeft.errors import RefusedError


def model_inputs(model: Any, image_shape: tuple[int | None, int] | None) -> ModelInputs:
    """The sizes of what a language model of transformers reads.

    Args:
        image_shape: (tokens, dim) of one image's features, where the model reads images.
    """
    config = text_config(model)
    num_layers = getattr(config, "num_hidden_layers", None) or 0
    heads, key_heads, head_dim, refused = 0, 0, 0, None
    try:
        blocks = find_blocks(model)
        key_heads, head_dim = _key_heads(model, blocks)
        heads = _attribute(config, "num_attention_heads") or key_heads
        num_layers = len(blocks)
    except RefusedError as error:
        refused = f"a prefix stands among the keys and values of every layer: {error}"
    return ModelInputs(
        model.get_input_embeddings().weight.shape[1],
        num_layers,
        heads,
        key_heads,
        head_dim,
        image_shape,
        refused,
    )


def _key_heads(model: nn.Module, blocks: list[Block]) -> tuple[int, int]:
    """Heads of keys and values, and their features, which must be the same in every layer.

    Raises:
        RefusedError: a layer without keys and values of its own, of keys wider than values, or of other sizes.
    """
    config, found = text_config(model), dict[tuple[int, int], str]()
    kinds = getattr(config, "layer_types", None) or []
    if states := [kind for kind in kinds if "linear" in kind or "attention" not in kind]:
        raise RefusedError(f"{type(model).__name__} has layers of {states[0]}, which keep a state")
    if not _attribute(config, "num_attention_heads"):
        raise RefusedError(f"the config of {type(model).__name__} names no one number of attention heads")
    for block in blocks:
        sizes = {role: _width(model, block, role) for role in ("k", "v")}
        if not sizes["k"] or not sizes["v"]:
            raise RefusedError(f"{type(model).__name__}: {block.path} has no keys and values of its own")
        head_dim = _head_dim(model, block)
        if sizes["k"] != sizes["v"]:
            raise RefusedError(
                f"{type(model).__name__}: {block.path} has keys of {sizes['k']} features and values of {sizes['v']}"
            )
        found.setdefault((sizes["k"] // head_dim, head_dim), block.path)
    if len(found) > 1:
        told = ", ".join(f"{heads} of {dim} in {path}" for (heads, dim), path in found.items())
        raise RefusedError(f"{type(model).__name__} has heads of several sizes: {told}")
    [sizes] = found
    return sizes


def _width(model: nn.Module, block: Block, role: str) -> int:
    """Features of the keys, or values, of one layer."""
    attention: Any = model.get_submodule(block.attention) if block.attention else None
    if hasattr(attention, "qk_nope_head_dim"):  # latent attention caches them by head
        dim = attention.qk_head_dim if role == "k" else attention.v_head_dim
        return attention.num_heads * dim
    parts = [part for part in block.parts if part.role == role]
    if block.attention is None or not parts:
        return 0
    if any(part.mixed_with for part in parts):
        return _attribute(text_config(model), "hidden_size") or 0
    return sum(
        len(part.features) if part.features is not None else features_of(model.get_submodule(part.path))[1]
        for part in parts
    )


def _head_dim(model: nn.Module, block: Block) -> int:
    attention: Any = model.get_submodule(block.attention or "")
    sizes = [
        getattr(each, name, None)
        for name in ("v_head_dim", "head_dim", "head_size", "attention_head_size")
        for each in attention.modules()
    ]
    config = text_config(model)
    own = next((int(size) for size in sizes if isinstance(size, int) and size), 0)
    return own or _attribute(config, "hidden_size") // _attribute(config, "num_attention_heads")


def _attribute(config: Any, name: str) -> int:
    """A number of a config; 0 where it has none, or another in each layer."""
    try:
        return int(getattr(config, name))
    except (AttributeError, TypeError, ValueError, RuntimeError):  # the last where it differs by layer
        return 0

"""The last layer for labelled tokens alone: behind its attention nothing mixes tokens, so that what nobody reads need
not be computed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from mmpeft.adapters import AdapterBank
from mmpeft.adapters.architecture import find_blocks
from mmpeft.errors import RefusedError


def behind_the_last_attention(language_model: nn.Module) -> list[str]:
    """Paths of what may work token by token: the attention's last linear and the feed-forward of the last layer; empty
    where they are not recognised."""
    try:
        block = find_blocks(language_model)[-1]
    except RefusedError:
        return []
    outputs = [part.path for part in block.parts if part.role == "o" and part.features is None]
    return outputs + ([] if block.feedforward is None else [block.feedforward])


@contextmanager
def last_layer_at(
    language_model: Any,
    paths: Sequence[str],
    bank: AdapterBank,
    places: Tensor | None,
    elsewhere: float = 0.0,
) -> Iterator[None]:
    """Inside, the last layer computes some tokens and nothing for all others, but for what finetunes change in it.

    Args:
        language_model: frozen.
        paths: what of it works token by token.
        bank: of its finetunes.
        places: (n,) int64, among rows times columns; None is all. So it is where layers recompute, out of here.
        elsewhere: what all others get.
    """
    if places is None or language_model.is_activation_checkpointing:
        yield
        return
    adapted = {id(layer.base) for layer in bank.layers.values()}
    modules = [language_model.get_submodule(path) for path in paths]
    modules = [module for module in modules if adapted.isdisjoint(map(id, module.modules()))]
    replaced = [module.__dict__.get("forward") for module in modules]
    for module in modules:
        module.forward = partial(_at, module.forward, places, elsewhere)
    try:
        yield
    finally:
        for module, own in zip(modules, replaced, strict=True):
            del module.forward
            if own is not None:
                module.forward = own


def _at(forward: Any, places: Tensor, elsewhere: float, x: Tensor) -> Tensor:
    flat = x.flatten(0, -2)
    some = forward(flat.index_select(0, places)[None])[0]
    every = some.new_full((len(flat), some.shape[-1]), elsewhere).index_copy(0, places, some)
    return every.view(*x.shape[:-1], -1)

"""Hidden states behind every decoder layer of a forward, before the final norm."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from mmpeft.adapters.architecture import find_layers


@contextmanager
def layer_outputs(language_model: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, the list has what every layer returned in the last forward, (..., columns, dim).

    Raises:
        RefusedError: the model's layers are not recognised.
    """
    layers = [language_model.get_submodule(path) for path in find_layers(language_model)]
    found: list[Any] = [None] * len(layers)

    def keep(number: int, module: Any, given: Any, output: Any) -> None:
        found[number] = output[0] if isinstance(output, tuple) else output

    with ExitStack() as hooks:
        for number, layer in enumerate(layers):
            hooks.callback(layer.register_forward_hook(partial(keep, number)).remove)
        yield found

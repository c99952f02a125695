"""Compiled layers: what a decoder computes around its attention, by torch.compile, while a graph is recorded.

Compiled are the modules that a layer consists of: norms, feed-forward, and attention but for attention by segments,
whose tiles are others in every batch. Layers share their graphs, which take any number of rows and columns, so that
thirty of them cost what one does.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache
from types import MethodType
from typing import Any

import torch
import torch._dynamo.config
import torch.fx.experimental._config
from torch import nn
from transformers import AttentionInterface

from mmpeft.adapters import AdapterBank
from mmpeft.adapters.architecture import find_blocks
from mmpeft.adapters.blocks import packed_experts
from mmpeft.adapters.layer import AdaptedForward
from mmpeft.errors import RefusedError
from mmpeft.models.reader import LanguageReader
from mmpeft.models.segment_attention import BY_SEGMENTS, segment_attention

SETTINGS: dict[Any, dict[str, bool]] = {
    torch._dynamo.config: {"force_nn_module_property_static_shapes": False, "specialize_float": True},
    torch.fx.experimental._config: {"use_duck_shape": False},
}
"""The compiler's, for graphs that any batch fits: which rows are whose is found through modules, and numbers of rows,
columns and heads that happen to be equal are none the less free."""


class CompiledLayers:
    """The layers of a language model, compiled or as they are; afterwards they are to be as they were before their bank
    gets or loses a finetune.

    Where no gradient is asked for, as in validation and decoding, nothing is compiled: it would be so once more.

    Args:
        reader: of the language model.
        bank: of its finetunes.
        backend: of torch.compile.

    Raises:
        RefusedError: the model's linears are quantised, or its layers are not recognised.
    """

    def __init__(self, reader: LanguageReader, bank: AdapterBank, backend: str = "inductor"):
        _check_dense(reader.language_model)
        layers = [
            layer for layer in bank.layers.values() if isinstance(layer, AdaptedForward)
        ]  # not of experts
        self._forwards: list[tuple[nn.Module, Any]] = [(layer.base, _traced(layer)) for layer in layers]
        adapted = {id(module) for module, _ in self._forwards}
        for module in _parts(reader):
            if id(module) not in adapted:
                compiled = torch.compile(module.forward, backend=backend, dynamic=True)
                self._forwards.append((module, _WhileLearning(module.forward, compiled)))
        self._replaced: list[tuple[nn.Module, Any]] = []
        self._as_before = ExitStack()

    def use(self) -> None:
        """From now on layers are compiled."""
        if self._replaced:
            return
        for settings, changes in SETTINGS.items():
            self._as_before.enter_context(settings.patch(**changes))
        AttentionInterface.register(BY_SEGMENTS, torch.compiler.disable(segment_attention))
        self._as_before.callback(AttentionInterface.register, BY_SEGMENTS, segment_attention)
        self._replaced = [(module, module.__dict__.get("forward")) for module, _ in self._forwards]
        for module, forward in self._forwards:
            module.forward = forward

    def leave(self) -> None:
        """From now on layers are as they were."""
        for module, forward in self._replaced:
            del module.forward
            if forward is not None:
                module.forward = forward
        self._replaced = []
        self._as_before.close()


def _traced(layer: AdaptedForward) -> Any:
    """An adapted layer's forward as a method, of which graphs that other layers share can be made: an object that is
    called is told from all others. Where features are dropped it is no part of a graph, which cannot seed generators.
    """
    drops = any(getattr(stack, "has_dropout", False) for stack in layer.stacks.values())
    return MethodType(_outside() if drops else AdaptedForward.__call__, layer)


@cache
def _outside() -> Any:
    """The forward of any adapted layer, never compiled; one for all, as graphs tell functions apart."""
    return torch.compiler.disable(AdaptedForward.__call__)


class _WhileLearning:
    """A module's forward, compiled where a graph is recorded."""

    def __init__(self, own: Any, compiled: Any):
        self.own, self.compiled = own, compiled

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        return (self.compiled if torch.is_grad_enabled() else self.own)(*inputs, **named)


def _parts(reader: LanguageReader) -> Iterator[nn.Module]:
    """What the layers consist of, without torch's own modules, which are a kernel each, what chooses its way by
    numbers, as experts do, and what `last_layer_at` changes from batch to batch."""
    model = reader.language_model
    changed = [model.get_submodule(path) for path in reader.last_modules]
    for block in find_blocks(model):
        for part in model.get_submodule(block.path).children():
            inside = list(part.modules())
            if type(part).__module__.startswith("torch.") or packed_experts(part):
                continue
            if any(isinstance(module, nn.ModuleList) or module in changed for module in inside):
                continue
            yield part


def _check_dense(model: nn.Module) -> None:
    kinds = {type(module).__name__ for module in model.modules()} & {"Linear4bit", "Linear8bitLt"}
    if kinds:
        raise RefusedError(
            f"model.compile: the base's linears are {kinds.pop()}, whose kernels are no part of a graph; set "
            "model.compile to false, or model.language.quantization to null"
        )

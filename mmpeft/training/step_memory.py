"""Memory of a step, found out without spending it: the model computes on fake tensors, which have shapes, no numbers,
while the bytes of those that live are counted. Of layers that are alike in a row few are computed, and one of them
stands for the others."""

import weakref
from collections.abc import Hashable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface

from mmpeft.adapters import AdapterBank
from mmpeft.adapters.architecture import find_blocks
from mmpeft.data.batch import Batch
from mmpeft.errors import RefusedError
from mmpeft.models.multimodal import MultimodalModel
from mmpeft.models.segment_attention import attending

SHAPES_ALONE = "mmpeft_shapes"
"""Name among the attention functions of transformers of the one that stands for flex attention."""
COMPUTED = 3
"""Of layers that are alike in a row: the first, the last, and one that stands for all between them."""


class LiveBytes(TorchDispatchMode):
    """Inside, what is computed from the given tensors is computed on fake ones, and the bytes of all tensors that are
    made and still referred to are counted. All else is computed as ever: what stands where in a batch, by which a step
    decides what it does.

    Args:
        shapes_only: the model's tensors and the batch's features.
        counted_apart: last dim of the tensors that `apart` counts.
    """

    def __init__(self, shapes_only: Iterable[Tensor], counted_apart: int = -1):
        super().__init__()
        self.now = 0
        self.peak = 0
        """The most bytes at once."""
        self.apart = 0
        """Of these, the bytes of tensors with that last dim."""
        self._apart_now, self._last_dim = 0, counted_apart
        self._faked = {tensor.untyped_storage()._cdata for tensor in shapes_only}
        self._fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # asked of every fake tensor, over and over
            return func(*args)
        if any(self._is_fake(each) for each in tree_leaves((args, kwargs))):
            with self._fakes:
                out = _of_shapes(func)(*args, **(kwargs or {}))
        else:
            out = func(*args, **(kwargs or {}))
        if not func.is_view:
            for made in tree_leaves(out):
                if isinstance(made, Tensor):
                    self._count(made)
        return out

    def _is_fake(self, each: Any) -> bool:
        return isinstance(each, FakeTensor) or (
            isinstance(each, Tensor) and each.untyped_storage()._cdata in self._faked
        )

    def _count(self, made: Tensor) -> None:
        storage = made.untyped_storage()
        key = storage._cdata
        if key in self._known or key in self._faked:
            return
        self._known.add(key)
        size = storage.nbytes()
        apart = size if made.dim() and made.shape[-1] == self._last_dim else 0
        self._apart_now += apart
        self.add(size)
        weakref.finalize(storage, self._forget, key, size, apart)

    def add(self, size: int) -> None:
        """Counts bytes that nobody made, or forgets them where ``size`` is negative."""
        self.now += size
        if self.now > self.peak:
            self.peak, self.apart = self.now, self._apart_now

    def _forget(self, key: int, size: int, apart: int) -> None:
        self._known.discard(key)
        self.now -= size
        self._apart_now -= apart


def _of_shapes(func: Any) -> Any:
    """An operator as it is on shapes alone: a product of experts is there of 16 bits only, where kernels take any."""
    return _grouped_product if func is torch.ops.aten._grouped_mm.default else func


def _grouped_product(a: Tensor, b: Tensor, *others: Any, **named: Any) -> Tensor:
    product = torch.ops.aten._grouped_mm.default(a.bfloat16(), b.bfloat16(), *others, **named)
    return product.to(a.dtype)


def count_step(model: MultimodalModel, batch: Batch, times: int = 1) -> LiveBytes:
    """The bytes that live beside the model's while a batch is learnt from, and those of its gradients. No number, no
    gradient and no random generator changes.

    Args:
        model: in training.
        batch: on the model's device; its features need no numbers.
        times: batches whose gradients are added up.

    Raises:
        Exception: what some model computes depends on numbers, such as which expert gets a token, or an operator of it
            cannot be computed on shapes alone.
    """
    bank = model.bank
    tensors = [*model.parameters(), *model.buffers(), *bank.parameters(), *bank.buffers()]
    gradients = [(tensor, tensor.grad) for tensor in tensors]
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    live = LiveBytes(
        [*tensors, *([] if batch.features is None else [batch.features])], model.reader.vocabulary_size
    )
    try:
        for tensor in tensors:
            tensor.grad = None
        with _attending_by_shape(model), _one_for_many(model.language_model, bank, live), live:
            for _ in range(times):
                model.token_losses(batch).nll.sum().backward()
    finally:
        for tensor, gradient in gradients:
            tensor.grad = gradient
        for module, own in buffers:  # some models keep what they computed, which is fake
            module._buffers.update(own)
    return live


@contextmanager
def _one_for_many(language_model: nn.Module, bank: AdapterBank, live: LiveBytes) -> Iterator[None]:
    """Inside, layers between the second and the last of a row that are alike pass on what they get; what the second
    adds to the living bytes, in the forward and in the backward, counts for each of them."""
    with ExitStack() as undone:
        for run in _runs_alike(language_model, bank):
            if len(run) <= COMPUTED:
                continue
            second, between = run[1], run[2:-1]
            stand_in = _StandIn(live, len(between))
            undone.callback(second.register_forward_pre_hook(stand_in.before).remove)
            undone.callback(second.register_forward_hook(stand_in.after).remove)
            for layer in between:
                replaced = layer.__dict__.get("forward")
                layer.forward = stand_in.pass_on
                undone.callback(_put_back, layer, replaced)
        yield


def _put_back(layer: Any, forward: Any) -> None:
    del layer.forward
    if forward is not None:
        layer.forward = forward


class _StandIn:
    """What a layer adds to the living bytes, counted for others that are alike.

    Args:
        live: the count.
        others: how many.
    """

    def __init__(self, live: LiveBytes, others: int):
        self.live, self.others = live, others
        self._since, self._returned_now = 0, False
        self._beside: tuple[Any, ...] | None = None
        """What the layer returns beside hidden states; None where these are all."""

    def before(self, layer: nn.Module, inputs: Any) -> None:
        self._since = self.live.now
        hidden = next((each for each in inputs if isinstance(each, Tensor)), None)
        if hidden is not None and hidden.requires_grad:
            hidden.register_hook(lambda _: self._count())

    def after(self, layer: nn.Module, inputs: Any, returned: Any) -> None:
        self._beside = returned[1:] if isinstance(returned, tuple) else None
        hidden = returned[0] if isinstance(returned, tuple) else returned
        self._returned_now = True
        if hidden.requires_grad:
            hidden.register_hook(lambda _: self._begin())

    def pass_on(self, hidden: Tensor, *others: Any, **named: Any) -> Any:
        """In place of the forward of each of the others. The first knows what the layer left behind: until it had
        returned, its input lived as well."""
        if self._returned_now:
            self._returned_now = False
            if hidden.requires_grad:  # without a graph nothing is left behind
                self._count()
        return hidden if self._beside is None else (hidden, *self._beside)

    def _begin(self) -> None:
        self._since = self.live.now

    def _count(self) -> None:
        self.live.add(self.others * (self.live.now - self._since))


def _runs_alike(language_model: nn.Module, bank: AdapterBank) -> Iterator[list[Any]]:
    """The decoder's layers, those that are alike and follow each other together; none where it is not known."""
    try:
        paths = [block.path for block in find_blocks(language_model)]
    except RefusedError:
        return
    for _, run in groupby(paths, lambda path: _kind(language_model, bank, path)):
        yield [language_model.get_submodule(path) for path in run]


def _kind(language_model: nn.Module, bank: AdapterBank, path: str) -> Hashable:
    """Equal for layers that need equal memory: modules, shapes, what trains, and what finetunes change in them."""
    layer, within = language_model.get_submodule(path), f"{path}."
    modules = tuple((name, type(module)) for name, module in layer.named_modules())
    shapes = tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in layer.named_parameters())
    stacks = tuple(
        (
            where.removeprefix(path),
            place,
            type(stack),
            tuple((n, p.shape) for n, p in stack.named_parameters()),
        )
        for where, adapted in bank.layers.items()
        if f"{where}.".startswith(within)
        for place, stack in adapted.stacks.items()
    )
    return modules, shapes, stacks, getattr(layer, "attention_type", None)


@contextmanager
def _attending_by_shape(model: MultimodalModel) -> Iterator[None]:
    """Inside, flex attention, which compiles for real numbers, is what keeps as much for the backward: fused SDPA."""
    reader = model.reader
    if not (reader.by_segments and model.device.type == "cuda"):
        yield
        return

    def no_mask(segments: Any, dtype: torch.dtype) -> Tensor:
        shape = len(segments.queries), 1, segments.queries.shape[1], segments.keys.shape[1]
        return torch.zeros((1, 1, 1, 1), dtype=dtype, device=segments.keys.device).expand(shape)

    reader.mask = no_mask
    try:
        with attending(reader.config, SHAPES_ALONE):
            yield
    finally:
        del reader.mask


def _sdpa(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float | None = None, **_: Any
) -> tuple[Tensor, None]:
    output = nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=True
    )
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(SHAPES_ALONE, _sdpa)

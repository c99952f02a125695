"""Folds a finetune into the base's weights: afterwards the base alone computes what the adapted model did.

==================== =========================== ==========================================================
base                 LoRA, DoRA, full            IA3
==================== =========================== ==========================================================
dense                ``W + c B A``, ``W + D``    ``diag(v) W``, ``diag(v) b`` and ``W diag(u)``
4 bits, absmax a     refused: see `dequantize`   ``a_block * v_row`` in fp32; the codes stay as they are
8 bits, row scales s refused: see `dequantize`   ``s |v|``, and the codes of rows with ``v < 0`` change sign
==================== =========================== ==========================================================

Scaling the columns of a quantised weight would mean quantising it again. In a gated feed-forward that is not
needed: ``down(u * act(gate x) * up x)`` is ``down(act(gate x) * (u * up x))``, so ``u`` scales the rows of
``up_proj``. BitFit goes into biases, where the base has them. Bottlenecks, prompts and prefixes are no change of a
weight and stay adapters.

Dense weights change in fp32 and are rounded to their dtype once.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mmpeft.adapters.bank import INPUTS, AdapterBank, Part, Place
from mmpeft.adapters.base_weights import (
    block_scales,
    check_not_packed,
    dense_weight,
    is_4bit,
    is_quantised,
    row_scales,
)
from mmpeft.adapters.layer import ORDER
from mmpeft.adapters.methods.base import AdapterConfig
from mmpeft.adapters.methods.bitfit import BitFitConfig
from mmpeft.adapters.methods.dora import DoraStack
from mmpeft.adapters.methods.full import FullConfig
from mmpeft.adapters.methods.ia3 import IA3Config
from mmpeft.adapters.methods.lora import LoraConfig
from mmpeft.adapters.targets import base_of, submodule
from mmpeft.errors import RefusedError

GATED_FEEDFORWARD = {"gate_proj", "up_proj", "down_proj"}
"""The children with weights of a feed-forward ``down(act(gate x) * up x)``. One more, such as BitNet's norm
before ``down_proj``, and scaling its input is no longer scaling ``up_proj``'s output."""
DEQUANTIZE_FIRST = (
    "make the base dense first (mmpeft.adapters.merge.dequantize, or `mmpeft merge` without --quantization)"
)


def merge(bank: AdapterBank, name: str) -> None:
    """Folds adapter ``name`` into the base and removes it from the bank.

    The bank's other finetunes stay, and from now on change the changed base.

    Raises:
        UnknownNameError: no such adapter.
        RefusedError: it holds NaN or infinite values, or a weight of the base cannot take it exactly. The base
            and the bank are unchanged then.
    """
    sick = [key for key, tensor in bank.tensors(name).items() if not tensor.isfinite().all()]
    if sick:
        raise RefusedError(
            f"adapter {name!r} holds NaN or infinite values in {len(sick)} tensors, such as {sick[0]}; "
            "it diverged, and merging it would destroy the base"
        )
    parts = [(part, place) for part in bank.entry(name).parts for place in bank.places_of(part)]
    parts.sort(key=lambda each: _turn(each[0].config, each[1].path))
    folds = [_fold(bank, part, place) for part, place in parts]
    for fold in folds:
        fold()
    bank.remove(name)
    for layer in bank.layers.values():
        for stack in layer.stacks.values():
            stack.attach(layer.base)  # pyright: ignore[reportCallIssue] DoRA keeps norms of the base


def unwrap(bank: AdapterBank) -> nn.Module:
    """The plain model: every layer back in the place that its adapted layer took.

    Raises:
        RefusedError: the bank still holds adapters, which would be lost.
    """
    if bank.names:
        raise RefusedError(f"the bank still holds {', '.join(bank.names)}; merge or remove them first")
    for path, layer in reversed(bank.layers.items()):
        parent, _, child = path.rpartition(".")
        setattr(base_of(submodule(bank.model, parent)), child, layer.base)
    bank.layers.clear()
    if bank.inputs:
        delattr(bank.model, INPUTS)
        bank.inputs.clear()
    return bank.model


def dequantize(model: nn.Module) -> nn.Module:
    """Makes the 4- or 8-bit linears of a transformers model dense, in place, also inside adapted linears.

    The weights become those that the quantised linears computed with, in the model's dtype. On a 4-bit base
    the outputs therefore stay; an 8-bit one also rounds activations, which now ends.

    Raises:
        RefusedError: the model is not quantised, or bitsandbytes has repacked it for inference.
    """
    if getattr(model, "hf_quantizer", None) is None:
        raise RefusedError(f"{type(model).__name__} is not quantised by transformers: nothing to dequantise")
    for path, module in model.named_modules():
        if getattr(module, "weight", None) is not None:
            check_not_packed(path, module)
    trainable = {path: parameter.requires_grad for path, parameter in model.named_parameters()}
    model.dequantize()  # pyright: ignore[reportCallIssue]
    for path, parameter in model.named_parameters():
        parameter.requires_grad_(trainable[path])  # transformers makes the new weights trainable
    return model


@torch.no_grad()
def add_lora(linear: nn.Module, lora_A: Tensor, lora_B: Tensor, scaling: float) -> None:
    """``W + c B A`` into the weight of an nn.Linear or a Conv1D of transformers.

    Args:
        lora_A: (r, I)
        lora_B: (O, r)
        scaling: c
    """
    add_weight(linear, scaling * (lora_B.float() @ lora_A.float()))


@torch.no_grad()
def add_weight(linear: nn.Module, change: Tensor) -> None:
    """``W + D`` into a dense linear's weight; ``change`` is D, (O, I)."""
    weight = dense_weight(linear)
    weight.copy_(weight.float() + change)


@torch.no_grad()
def add_bias(linear: Any, change: Tensor) -> None:
    """Adds ``change`` (O,) to a linear's bias."""
    linear.bias.copy_(linear.bias.float() + change)


@torch.no_grad()
def scale_columns(linear: nn.Module, scale: Tensor) -> None:
    """``W diag(u)`` into a dense linear's weight; ``scale`` is u, (I,)."""
    weight = dense_weight(linear)
    weight.copy_(weight.float() * scale)


@torch.no_grad()
def scale_rows(linear: Any, scale: Tensor) -> None:
    """``diag(v) W`` and ``diag(v) b`` into a linear, dense or quantised; ``scale`` is v, (O,)."""
    if is_4bit(linear):
        _scale_blocks(linear.weight.quant_state, scale)
    elif is_quantised(linear):
        _scale_codes(linear, scale)
    else:
        weight = dense_weight(linear)
        weight.copy_(weight.float() * scale[:, None])
    if linear.bias is not None:
        linear.bias.copy_(linear.bias.float() * scale)


def _turn(config: AdapterConfig, path: str) -> int:
    """When a part acts among the others of its layer: scaling comes before adding."""
    place = config.place(path)
    return ORDER.index(place) if place in ORDER else len(ORDER)


def _fold(bank: AdapterBank, part: Part, place: Place) -> Callable[[], None]:
    """What merges one place, after its checks: all are checked before the first one changes."""
    config, (path, stack, slot) = part.config, place
    if not isinstance(config, LoraConfig | IA3Config | FullConfig | BitFitConfig):
        raise RefusedError(
            f"{config.method} is no change of a weight and cannot be merged; serve the adapter, or merge one of "
            "LoRA, DoRA, IA3, BitFit or full"
        )
    base: Any = base_of(submodule(bank.model, path))
    tensors = stack.tensors(slot)
    if isinstance(config, IA3Config):
        return _fold_ia3(bank, config, path, tensors["ia3_l"].flatten())
    if isinstance(config, BitFitConfig):
        if base.bias is None:
            raise RefusedError(
                f"{path} has no bias in this architecture, so a plain model has no place for one; serve the adapter"
            )
        return partial(add_bias, base, tensors["bias_delta"])
    if is_quantised(base):
        raise RefusedError(
            f"{path} is quantised: adding {config.method}'s update would quantise its weight anew, an error as large "
            f"as the first; {DEQUANTIZE_FIRST}"
        )
    if isinstance(config, FullConfig):
        return partial(add_weight, base, tensors["weight_delta"])
    fold = partial(add_lora, base, tensors["lora_A.weight"], tensors["lora_B.weight"], config.scaling)
    if not isinstance(stack, DoraStack):
        return fold
    factor = stack.factors()[slot]
    bias = None if base.bias is None else base.bias.detach().float().clone()

    def fold_dora() -> None:
        fold()
        weight = dense_weight(base)
        weight.copy_(weight.float() * factor[:, None])
        if (
            bias is not None
        ):  # DoRA leaves the base's bias alone, but takes what an IA3 made of it for product
            base.bias.copy_(base.bias.float() + (factor - 1) * (base.bias.float() - bias))

    return torch.no_grad()(fold_dora)


def _fold_ia3(bank: AdapterBank, config: IA3Config, path: str, scale: Tensor) -> Callable[[], None]:
    base = base_of(submodule(bank.model, path))
    if config.scales_input(path):
        if not is_quantised(base):
            return partial(scale_columns, base, scale)
        path = _up_projection(bank, path)
        base = base_of(submodule(bank.model, path))
    _check_rows(path, base)
    return partial(scale_rows, base, scale)


def _up_projection(bank: AdapterBank, path: str) -> str:
    parent, _, child = path.rpartition(".")
    block = base_of(submodule(bank.model, parent))
    weighted = {name for name, module in block.named_children() if any(True for _ in module.parameters())}
    if child != "down_proj" or weighted != GATED_FEEDFORWARD:
        raise RefusedError(
            f"{path} is quantised and IA3 scales its input: that is exact only by way of up_proj in a gated "
            f"feed-forward of {', '.join(sorted(GATED_FEEDFORWARD))}; {parent or 'its parent'} has "
            f"{', '.join(sorted(weighted))}; {DEQUANTIZE_FIRST}"
        )
    return f"{parent}.up_proj".lstrip(".")


def _check_rows(path: str, linear: Any) -> None:
    check_not_packed(path, linear)
    if is_4bit(linear) and linear.in_features % linear.weight.quant_state.blocksize:
        raise RefusedError(
            f"{path} has {linear.in_features} input features, no multiple of its 4-bit blocks of "
            f"{linear.weight.quant_state.blocksize}: one block would lie in two rows; {DEQUANTIZE_FIRST}"
        )


def _scale_blocks(state: Any, scale: Tensor) -> None:
    """Scales the blocks of a 4-bit weight by the ``scale`` (O,) of their rows.

    A negative scale makes a negative absmax. NF4's codes have no mirror images, so they cannot change sign;
    but every kernel computes ``code * absmax``, which is exact for either. The scales of double quantisation
    are 8-bit codes themselves and become plain fp32 (0.37 bit a parameter more). Files take that layer by
    layer: bitsandbytes goes by the tensors it finds, not by the config's double_quant. Its packing for
    AVX512-BF16 is not undone for plain scales (0.50.2), so save before a forward that may pack.
    """
    absmax = block_scales(state)
    state.nested, state.state2, state.offset = False, None, None
    state.absmax = (absmax.view(len(scale), -1) * scale[:, None]).flatten()


def _scale_codes(linear: Any, scale: Tensor) -> None:
    row_scales(linear).mul_(scale.abs())
    linear.weight.data.mul_(torch.where(scale < 0, -1, 1).to(torch.int8)[:, None])

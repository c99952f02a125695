"""DoRA: LoRA changes a weight's direction, a learned vector its rows' magnitude.

``y = m * (W + c B A) x / ||W + c B A||`` with the norm of each output feature's weights, held constant in the
backward pass.

Source: Liu et al. 2024, equations 5 and 11 (the constant norm is section 4.3).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmpeft.adapters.base_weights import dense_weight, gathered, is_4bit, read_weight
from mmpeft.adapters.functional import BASE, gather_slots
from mmpeft.adapters.methods.base import ModelInputs, TargetNames
from mmpeft.adapters.methods.lora import LoraConfig, LoraStack
from mmpeft.adapters.methods.stack import Stack
from mmpeft.adapters.weight_updates import add_bias, scale_rows_of_weight

ROWS_AT_ONCE = 256
"""Rows of the identity that are sent through the base together to learn its weight's norms."""


@dataclass
class DoraConfig(LoraConfig):
    """Low-rank updates of chosen linears' directions, and their magnitudes. Dropout acts on the update."""

    method: ClassVar[str] = "dora"
    usual: ClassVar[dict[str, dict[str, Any]]] = {"DoRA r=16": {"rank": 16}}
    on_experts: ClassVar[bool] = False

    def make_stack(self, path: str, in_features: int, out_features: int, num_slots: int, size: int) -> Stack:
        return DoraStack(in_features, out_features, num_slots, size, path)

    def shapes(self, path: str, in_features: int, out_features: int) -> dict[str, list[int]]:
        return super().shapes(path, in_features, out_features) | {"lora_magnitude_vector": [out_features]}

    @classmethod
    def reads_peft(cls, raw: dict[str, Any]) -> bool:
        return raw.get("peft_type") == cls.peft_type and bool(raw.get("use_dora"))

    def changes_nothing(self, layer: nn.Module, tensors: dict[str, Tensor]) -> bool:
        """Where also the magnitudes are the norms of the base's rows."""
        if not super().changes_nothing(layer, tensors):
            return False
        norms = torch.linalg.vector_norm(read_weight("a linear under DoRA", layer), dim=1)
        return torch.allclose(tensors["lora_magnitude_vector"].to(norms), norms, rtol=1e-5, atol=0)

    def to_peft(self, sites: list[str], names: TargetNames, inputs: ModelInputs | None) -> dict[str, Any]:
        return super().to_peft(sites, names, inputs) | {"use_dora": True}

    def fold(self, path: str, model: nn.Module, stack: Any, slot: int) -> Callable[[], None]:
        """The base's bias stays, but what an IA3 made of it counts as product."""
        add_update = super().fold(path, model, stack, slot)
        linear: Any = model.get_submodule(path)
        factor = stack.factors()[slot]
        bias = None if bias_of(linear) is None else linear.bias.detach().float().clone()

        @torch.no_grad()
        def fold_dora() -> None:
            add_update()
            scale_rows_of_weight(linear, factor)
            if bias is not None:
                add_bias(linear, (factor - 1) * (linear.bias.float() - bias))

        return fold_dora

    def change_weight(self, change: Tensor, weight: Tensor, path: str, stack: Any, slot: int) -> None:
        super().change_weight(change, weight, path, stack, slot)
        factor = stack.factors()[slot][:, None]
        change.mul_(factor).addcmul_(weight, factor - 1)

    def change_norm(self, stack: Any, slot: int) -> Tensor | None:
        return None


class DoraStack(LoraStack):
    """LoRA's stack and ``magnitude`` (S, O).

    A 4-bit base has no dense weight to take the norm of, and need not: sent the rows of ``A`` it answers with
    ``W A^T``, which is all that the norm of ``W + cBA`` needs beside that of ``W``.
    """

    method = DoraConfig.method
    turn = 10

    def __init__(self, in_features: int, out_features: int, num_slots: int, rank: int, path: str = ""):
        super().__init__(in_features, out_features, num_slots, rank, path)
        self.magnitude = nn.Parameter(torch.zeros(num_slots, out_features))

    @torch.no_grad()
    def attach(self, base: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
        super().attach(base, forward)
        self._base = [base]  # in a list: the base stays the layer's module, not this one's
        self._forward = forward
        if isinstance(base, nn.Embedding):  # as many columns as the vocabulary has tokens
            self._squares = dense_weight(base).float().square().sum(1)
            return
        identity = torch.eye(self.lora_A.shape[-1], device=self.lora_A.device)
        with gathered(base):
            squares = [self._weight_times(rows).square().sum(0) for rows in identity.split(ROWS_AT_ONCE)]
        self._squares = torch.stack(squares).sum(0)

    def on_output(self, x: Tensor, y: Tensor, slots: Tensor, uniform: bool) -> Tensor:
        if self.training and self.has_dropout and x.is_floating_point():
            x = self._drop(x, slots)
        delta = self.delta(x, slots)
        delta = delta if self.output_scale == 1 else delta * self.output_scale
        stacks = self.lora_A, self.lora_B, self.scaling, self.magnitude
        less, factor, served = self.for_rows(
            stacks, partial(self._of_rows, slots, y.dtype), ("factors", y.dtype)
        )
        bias = bias_of(self._base[0])
        product = y if bias is None else y - bias.to(y.dtype)
        # y + (f - 1) Wx + f cBAx, so that f = 1 leaves y as it is, to the bit
        changed = y + less * product + factor * delta
        return torch.where(served, changed, y)

    @torch.no_grad()
    def open(self, slot: int, config: LoraConfig, generator: torch.Generator) -> None:
        """As LoRA, with the magnitudes of the base."""
        super().open(slot, config, generator)
        self.magnitude[slot] = self._squares.sqrt()

    @property
    def _is_dense(self) -> bool:
        weight: Any = self._base[0].weight
        return weight.is_floating_point() and weight.dim() == 2

    def tensors(self, slot: int) -> dict[str, Tensor]:
        return super().tensors(slot) | {"lora_magnitude_vector": self.magnitude.detach()[slot]}

    def factors(self) -> Tensor:
        """(S, O): ``m / |W + c B A|`` of every slot."""
        return self._factors(self.lora_A, self.lora_B, self.scaling, self.magnitude, self.active)

    def _of_rows(self, slots: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Of every row its factor less one and its factor, (B, 1, O), and whether it has one, (B, 1, 1)."""
        slots = self.effective(slots)
        if (
            len(slots) < len(self.magnitude) and not torch.is_grad_enabled()
        ):  # of thousands that are served, theirs
            stacks = self.lora_A, self.lora_B, self.scaling, self.magnitude
            A, B, scaling, magnitude = (gather_slots(stack, slots) for stack in stacks)
            factors = self._factors(A, B, scaling, magnitude, slots != BASE)
        else:
            factors = gather_slots(self.factors(), slots)
        factors = factors.unsqueeze(1)
        return (factors - 1).to(dtype), factors.to(dtype), (slots != BASE).view(-1, 1, 1)

    def _factors(self, A: Tensor, B: Tensor, scaling: Tensor, magnitude: Tensor, active: Tensor) -> Tensor:
        """(n, O) of some slots (n, ...); 1 where all weights of a feature are zero."""
        norms = self._norms(A, B, scaling, active)
        return torch.where(norms > 0, magnitude / norms.clamp(min=torch.finfo(norms.dtype).tiny), 1)

    @torch.no_grad()
    def _norms(self, A: Tensor, B: Tensor, scaling: Tensor, active: Tensor) -> Tensor:
        """(n, O) norms of the rows of ``W + c B A`` of some slots; one where the slot is empty.

        ``|W + cBA|^2 = |W|^2 + 2 c <W A^T, B> + c^2 <B A A^T, B>`` by row.
        """
        B = B * scaling[:, None, None]
        products = self._weight_times(A.flatten(0, 1)).unflatten(0, A.shape[:2])  # (S, R, O)
        cross = (products.transpose(1, 2) * B).sum(-1)
        own = (torch.bmm(B, torch.bmm(A, A.transpose(1, 2))) * B).sum(-1)
        squares = self._squares.to(own.device) + 2 * cross + own
        return torch.where(active[:, None], squares.clamp(min=0).sqrt(), 1)

    def _weight_times(self, rows: Tensor) -> Tensor:
        """(n, I) -> (n, O): ``W`` times each row. A dense weight is used as it is: taking the bias off the base's
        rounded answer, as a 4-bit base needs it, costs the more precision the larger the bias. An 8-bit base would
        round the rows too, so its weight is read."""
        base: Any = self._base[0]
        if self._is_dense:
            weight = dense_weight(base)
            return F.linear(rows.to(weight.dtype), weight).float()
        if not is_4bit(base):
            return F.linear(rows.float(), read_weight(self.path, base))
        product = self._forward(rows).float()
        return product if base.bias is None else product - base.bias.float()


def bias_of(layer: nn.Module) -> Tensor | None:
    """An embedding has none."""
    return getattr(layer, "bias", None)

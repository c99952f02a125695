"""Activated LoRA: a LoRA that acts from the last occurrence of its invocation tokens on.

Whatever stands before them has the base's hidden states, so that its keys and values are those of the base.

Source: Greenewald et al. 2025, section 3; ``ALoraLinearVariant`` and ``calculate_alora_offsets`` of
``peft/tuners/lora/variants.py``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmpeft.adapters.functional import BASE
from mmpeft.adapters.methods.base import AdapterConfig, Beyond, ModelInputs, TargetNames
from mmpeft.adapters.methods.lora import LoraConfig, LoraStack
from mmpeft.adapters.methods.stack import Stack
from mmpeft.errors import RefusedError

FIELD = "alora_invocation_tokens"
"""What PEFT calls `ALoraConfig.invocation_tokens`."""


@dataclass
class ALoraConfig(LoraConfig):
    """Low-rank updates of chosen linears from the invocation tokens on, those included."""

    method: ClassVar[str] = "alora"
    usual: ClassVar[dict[str, dict[str, Any]]] = {}
    beyond: ClassVar[tuple[Beyond, ...]] = ()
    on_experts: ClassVar[bool] = False
    changes_weight: ClassVar[bool] = False

    invocation_tokens: list[int] = field(default_factory=list)
    """Ids of the tokens that call it; a conversation without them is answered by the base."""

    def __post_init__(self):
        super().__post_init__()
        ids = self.invocation_tokens
        if not isinstance(ids, list) or not ids or not all(isinstance(i, int) and i >= 0 for i in ids):
            raise RefusedError(f"ALoraConfig.invocation_tokens is {ids!r}; wanted a list of ids of tokens")

    @property
    def invocation(self) -> Sequence[int]:
        return self.invocation_tokens

    def make_stack(self, path: str, in_features: int, out_features: int, num_slots: int, size: int) -> Stack:
        return ALoraStack(in_features, out_features, num_slots, size, path)

    @classmethod
    def reads_peft(cls, raw: dict[str, Any]) -> bool:
        return raw.get("peft_type") == cls.peft_type and bool(raw.get(FIELD))

    @classmethod
    def from_peft(cls, raw: dict[str, Any]) -> AdapterConfig:
        if beside := [name for name in ("use_dora", "lora_bias") if raw.get(name)]:
            raise RefusedError(
                f"{FIELD} is set beside {beside[0]}, which has no meaning here for a part of the tokens; train the "
                f"adapter without {beside[0]}"
            )
        return cls(**vars(LoraConfig.from_peft(raw)), invocation_tokens=raw[FIELD])

    def to_peft(self, sites: list[str], names: TargetNames, inputs: ModelInputs | None) -> dict[str, Any]:
        return super().to_peft(sites, names, inputs) | {FIELD: self.invocation_tokens}

    def fold(self, path: str, model: nn.Module, stack: Any, slot: int) -> Callable[[], None]:
        return AdapterConfig.fold(self, path, model, stack, slot)


class ALoraStack(LoraStack):
    """LoRA's stack, whose update reaches the tokens of `Routing.invoked` alone."""

    method = ALoraConfig.method

    def on_output(self, x: Tensor, y: Tensor, slots: Tensor, uniform: bool) -> Tensor:
        invoked = self.routing.invoked_of(x)
        if invoked is None:
            return y
        if self.training and self.has_dropout:
            x = self._drop(x, slots)
        slots = self.effective(slots)
        delta = self.delta(x, slots)
        acts = invoked & (slots != BASE)[:, None]
        return torch.where(acts.unsqueeze(-1), y + delta.to(y.dtype), y)

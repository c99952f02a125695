"""Prefix tuning: trained keys and values that every layer's attention sees before the row's own.

Source: Li and Liang 2021, without the network that some use to train the prefix.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmpeft.adapters.functional import gather_slots
from mmpeft.adapters.methods.base import ModelInputs, TargetNames
from mmpeft.adapters.methods.prompt import PromptConfig
from mmpeft.adapters.methods.stack import Stack
from mmpeft.errors import RefusedError

START_SCALE = 0.02
"""Standard deviation of a fresh prefix; values this small change the base little."""


@dataclass
class PrefixConfig(PromptConfig):
    """Trained keys and values of every layer."""

    method: ClassVar[str] = "prefix"
    peft_type: ClassVar[str] = "PREFIX_TUNING"
    usual: ClassVar[dict[str, dict[str, Any]]] = {"prefix of 20": {"num_virtual_tokens": 20}}

    def make_stack(self, path: str, in_features: int, out_features: int, num_slots: int, size: int) -> Stack:
        return PrefixStack(out_features, num_slots, size)

    def input_features(self, inputs: ModelInputs) -> tuple[int, int]:
        if inputs.no_prefix:
            raise RefusedError(f"prefix tuning: {inputs.no_prefix}; use prompt tuning, or a method of layers")
        return inputs.hidden_size, inputs.num_layers * 2 * inputs.num_key_heads * inputs.head_dim

    def to_peft(self, sites: list[str], names: TargetNames, inputs: ModelInputs | None) -> dict[str, Any]:
        """As a prompt's, of the heads that have keys and values."""
        fields = super().to_peft(sites, names, inputs)
        assert inputs is not None, "prefixes are a method of inputs"
        heads = inputs.num_key_heads
        return fields | {"token_dim": heads * inputs.head_dim, "num_attention_heads": heads}


class PrefixStack(Stack):
    """The prefixes of every slot: ``prefix`` (S, R, layers * 2 * key heads * head dim), laid out as PEFT's:
    keys of layer 0, values of layer 0, keys of layer 1, ...
    """

    method = PrefixConfig.method
    size_dims: ClassVar[dict[str, int]] = {"prefix": 1}

    def __init__(self, features: int, num_slots: int, num_tokens: int):
        super().__init__(num_slots)
        self.prefix = nn.Parameter(torch.zeros(num_slots, num_tokens, features))

    def virtual_keys_values(self, slots: Tensor, num_layers: int, num_heads: int) -> Tensor:
        rows = gather_slots(self.prefix, self.effective(slots)).unflatten(-1, (num_layers, 2, num_heads, -1))
        return rows.permute(2, 3, 0, 4, 1, 5)

    @torch.no_grad()
    def open(self, slot: int, config: PrefixConfig, generator: torch.Generator) -> None:
        super().open(slot, config, generator)
        start = torch.empty(config.num_virtual_tokens, self.prefix.shape[-1])
        self.prefix[slot, : config.num_virtual_tokens] = start.normal_(0, START_SCALE, generator=generator)

    def tensors(self, slot: int) -> dict[str, Tensor]:
        return {"prompt_embeddings": self.prefix.detach()[slot, : self.sizes[slot]]}

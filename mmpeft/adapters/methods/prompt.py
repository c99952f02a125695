"""Prompt tuning (soft prompts) and P-tuning: trained embeddings that a row reads before its own tokens.

Source: Lester et al. 2021 (prompt tuning); Liu et al. 2021 (P-tuning: the embeddings come out of a small network,
which is only a way to train them; files hold its output, as PEFT's do).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mmpeft.adapters.functional import gather_slots
from mmpeft.adapters.methods.base import AdapterConfig, ModelInputs, TargetNames, required
from mmpeft.adapters.methods.stack import Stack, linear_start
from mmpeft.errors import RefusedError


@dataclass
class PromptConfig(AdapterConfig):
    """Trained embeddings before the text."""

    method: ClassVar[str] = "prompt"
    peft_type: ClassVar[str] = "PROMPT_TUNING"
    usual: ClassVar[dict[str, dict[str, Any]]] = {"prompt of 20": {"num_virtual_tokens": 20}}
    home: ClassVar[Literal["layers", "inputs"]] = "inputs"

    num_virtual_tokens: int = 20
    """Length of the prompt."""

    def __post_init__(self):
        tokens = self.num_virtual_tokens
        if not isinstance(tokens, int) or tokens < 1:
            raise RefusedError(
                f"{type(self).__name__}.num_virtual_tokens is {tokens!r}; it must be an integer of at least 1"
            )

    @property
    def size(self) -> int:
        return self.num_virtual_tokens

    def make_stack(self, path: str, in_features: int, out_features: int, num_slots: int, size: int) -> Stack:
        return PromptStack(out_features, num_slots, size)

    def shapes(self, path: str, in_features: int, out_features: int) -> dict[str, list[int]]:
        return {"prompt_embeddings": [self.num_virtual_tokens, out_features]}

    @classmethod
    def from_peft(cls, raw: dict[str, Any]) -> AdapterConfig:
        return cls(required(raw, "num_virtual_tokens"))

    def to_peft(self, sites: list[str], names: TargetNames, inputs: ModelInputs | None) -> dict[str, Any]:
        """PEFT builds its module from these numbers before it reads the tensors."""
        assert inputs is not None, "prompts are a method of inputs"
        return {
            **self.peft_head(),
            "num_virtual_tokens": self.num_virtual_tokens,
            "token_dim": inputs.hidden_size,
            "num_transformer_submodules": 1,
            "num_attention_heads": inputs.num_heads,
            "num_layers": inputs.num_layers,
        }


@dataclass
class PTuningConfig(PromptConfig):
    """Trained embeddings before the text, made by a network of two hidden layers."""

    method: ClassVar[str] = "p_tuning"
    peft_type: ClassVar[str] = "P_TUNING"
    usual: ClassVar[dict[str, dict[str, Any]]] = {}

    def make_stack(self, path: str, in_features: int, out_features: int, num_slots: int, size: int) -> Stack:
        return PTuningStack(out_features, num_slots, size)

    @classmethod
    def from_peft(cls, raw: dict[str, Any]) -> AdapterConfig:
        """As prompt tuning: the file holds the prompt that the network made, not the network."""
        return PromptConfig.from_peft(raw)


class PromptStack(Stack):
    """The prompts of every slot: ``prompt`` (S, R, dim), of which slot s uses the first ``sizes[s]``."""

    method = PromptConfig.method
    size_dims: ClassVar[dict[str, int]] = {"prompt": 1}

    def __init__(self, dim: int, num_slots: int, num_tokens: int):
        super().__init__(num_slots)
        self.prompt = nn.Parameter(torch.zeros(num_slots, num_tokens, dim))

    def attach(self, base: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
        self._embedding: list[Any] = [base, forward]  # in a list: it stays the model's module, not this one's

    def virtual_embeds(self, slots: Tensor) -> Tensor:
        return gather_slots(self._prompts(), self.effective(slots))

    def _prompts(self) -> Tensor:
        return self.prompt

    @torch.no_grad()
    def open(self, slot: int, config: PromptConfig, generator: torch.Generator) -> None:
        """Embeddings of random tokens of the vocabulary (Lester et al., section 3.2), as the model reads them: some
        scale or normalise what their table holds."""
        super().open(slot, config, generator)
        embedding, embed = self._embedding
        ids = torch.randint(len(embedding.weight), (config.num_virtual_tokens,), generator=generator)
        self.prompt[slot, : config.num_virtual_tokens] = embed(ids.to(embedding.weight.device)).float()

    def tensors(self, slot: int) -> dict[str, Tensor]:
        return {"prompt_embeddings": self._prompts().detach()[slot, : self.sizes[slot]]}


class PTuningStack(PromptStack):
    """A prompt and the network it goes through: ``weight_k`` (S, dim, dim), ``bias_k`` (S, dim)."""

    method = PTuningConfig.method
    LAYERS: ClassVar[int] = 3

    def __init__(self, dim: int, num_slots: int, num_tokens: int):
        super().__init__(dim, num_slots, num_tokens)
        for layer in range(self.LAYERS):
            self.register_parameter(f"weight_{layer}", nn.Parameter(torch.zeros(num_slots, dim, dim)))
            self.register_parameter(f"bias_{layer}", nn.Parameter(torch.zeros(num_slots, dim)))

    def _prompts(self) -> Tensor:
        hidden = self.prompt
        for layer in range(self.LAYERS):
            weight, bias = self.get_parameter(f"weight_{layer}"), self.get_parameter(f"bias_{layer}")
            hidden = torch.baddbmm(bias[:, None], hidden, weight.transpose(1, 2))
            hidden = torch.relu(hidden) if layer + 1 < self.LAYERS else hidden
        return hidden

    @torch.no_grad()
    def open(self, slot: int, config: PromptConfig, generator: torch.Generator) -> None:
        """The prompt as in prompt tuning, the network as PyTorch starts linears."""
        super().open(slot, config, generator)
        for name, parameter in self.named_parameters():
            if name != "prompt":
                parameter[slot] = linear_start(*parameter.shape[1:], generator=generator)

    def fill(self, slot: int, tensors: dict[str, Tensor]) -> None:
        """Raises:
        RefusedError: always; the network cannot be had from its output. Load such a file as a prompt."""
        raise RefusedError("a P-tuning file holds the prompt that the network made; load it as prompt tuning")

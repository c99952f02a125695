"""Sampling (greedy, temperature, top-k, top-p): which token each conversation writes next, by its own settings."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmpeft.errors import RefusedError, require_positive


@dataclass(frozen=True)
class Sampling:
    """How one conversation is decoded: temperature, then top-k, then top-p."""

    max_new_tokens: int = 64
    """Longest answer."""
    temperature: float = 0.0
    """Divides the logits; 0 is greedy decoding."""
    top_k: int | None = None
    """Only the k most likely tokens."""
    top_p: float | None = None
    """Only the most likely tokens that together have this probability (nucleus sampling)."""
    seed: int = 0
    """Of the conversation's own random stream: what it writes does not depend on its neighbours."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; compared by who has the tokenizer, see `Decoder.leave`."""

    def __post_init__(self):
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        if not all(isinstance(text, str) and text for text in self.stop):
            raise RefusedError(f"stop is {self.stop!r}; wanted texts that are not empty")
        whole = {"max_new_tokens": self.max_new_tokens, "seed": self.seed, "top_k": self.top_k}
        for name, value in whole.items():
            if not isinstance(value, int) and not (name == "top_k" and value is None):
                raise RefusedError(f"{name} is {value!r}; it must be a whole number")
        for name in ("temperature", "top_p"):
            if not isinstance(value := getattr(self, name), int | float | None):
                raise RefusedError(f"{name} is {value!r}; it must be a number")
        require_positive("max_new_tokens", self.max_new_tokens)
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise RefusedError(
                f"temperature is {self.temperature!r}; it must be a finite number of at least 0, where 0 is greedy"
            )
        if self.top_k is not None and self.top_k < 1:
            raise RefusedError(f"top_k is {self.top_k!r}; it must be at least 1, or None for all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise RefusedError(
                f"top_p is {self.top_p!r}; it must be above 0 and at most 1, or None for all tokens"
            )

    @property
    def greedy(self) -> bool:
        """Whether only the most likely token can be drawn."""
        return self.temperature == 0 or self.top_k == 1


def sample(
    logits: Tensor, sampling: Sequence[Sampling], generators: Sequence[torch.Generator | None]
) -> Tensor:
    """The next token of every conversation.

    Args:
        logits: (conversations, vocabulary). A row of NaN gives some token to its own conversation.
        sampling: of every conversation.
        generators: its random stream, on the logits' device; not needed where it is greedy.

    Returns:
        (conversations,) int64
    """
    tokens = logits.max(
        -1
    ).indices  # the first of equals, as argmax, which is four times slower in bf16 on CPU
    for row, (own, generator) in enumerate(zip(sampling, generators, strict=True)):
        if not own.greedy:
            tokens[row] = _draw(logits[row].float(), own, generator)
    return tokens


def _draw(logits: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Tensor:
    """One token of the (vocabulary,) float32 logits."""
    smallest = torch.finfo(logits.dtype).tiny
    # the largest becomes 0 first: a tiny temperature would make infinities of the others' distances only
    logits = (logits - logits.max()) / max(sampling.temperature, smallest)
    tokens = None
    if sampling.top_k is not None:
        logits, tokens = logits.topk(min(sampling.top_k, len(logits)))
    elif sampling.top_p is not None:
        logits, tokens = logits.sort(descending=True, stable=True)
    probabilities = logits.softmax(-1)
    if sampling.top_p is not None:
        before = probabilities.cumsum(-1) - probabilities  # 0 for the first, which therefore stays
        probabilities = probabilities.masked_fill(before >= sampling.top_p, 0)
    # The first of exponential clocks with these rates is a draw from these probabilities: unlike torch.multinomial
    # it does not raise on NaN, which stays its conversation's own, and it does not wait for the device.
    clocks = torch.empty_like(probabilities).exponential_(generator=generator).clamp(min=smallest)
    drawn = (probabilities / clocks).argmax()
    return drawn if tokens is None else tokens[drawn]

"""Trained tokens: a slot's own embeddings of a few tokens, by which a tied head scores them too.

A slot holds the embeddings themselves, as PEFT's files do.

Source: PEFT's ``trainable_token_indices``, ``peft/tuners/trainable_tokens/layer.py``.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmpeft.adapters.functional import BASE, gather_slots
from mmpeft.adapters.methods.base import AdapterConfig, Beyond
from mmpeft.adapters.methods.stack import Stack
from mmpeft.errors import RefusedError


@dataclass
class TokenRowsConfig(AdapterConfig):
    """Embeddings of chosen tokens."""

    method: ClassVar[str] = "token_rows"
    peft_type: ClassVar[str] = "MMPEFT_TOKEN_ROWS"
    beyond: ClassVar[tuple[Beyond, ...]] = ("head", "embedding")

    token_indices: list[int] = field(default_factory=list)
    """The ids of the tokens, none of them twice."""
    target_modules: str | list[str] = field(default_factory=list)
    """The path of the input embedding, and that of a head that shares its weight."""
    tied_heads: list[str] = field(default_factory=list)
    """Which of them is the head."""

    def __post_init__(self):
        ids = self.token_indices
        if not ids or len({*ids}) < len(ids) or not all(isinstance(i, int) and i >= 0 for i in ids):
            raise RefusedError(f"token_indices is {ids!r}; wanted ids of tokens, none of them twice")

    @property
    def size(self) -> int:
        return len(self.token_indices)

    def make_stack(self, path: str, in_features: int, out_features: int, num_slots: int, size: int) -> Stack:
        return TokenRowsStack(self._dim(path, in_features, out_features), num_slots, size)

    def shapes(self, path: str, in_features: int, out_features: int) -> dict[str, list[int]]:
        return {"token_rows": [self.size, self._dim(path, in_features, out_features)]}

    def _dim(self, path: str, in_features: int, out_features: int) -> int:
        return in_features if path in self.tied_heads else out_features

    def changes_nothing(self, layer: nn.Module, tensors: dict[str, Tensor]) -> bool:
        base: Any = layer.weight
        rows = base.detach()[torch.tensor(self.token_indices, device=base.device)]
        return torch.equal(tensors["token_rows"].to(rows), rows)

    def fold(self, path: str, model: nn.Module, stack: Any, slot: int) -> Callable[[], None]:
        weight: Any = model.get_submodule(path).weight

        @torch.no_grad()
        def put_rows() -> None:
            weight[stack.ids[slot, : self.size]] = stack.tensors(slot)["token_rows"].to(weight)

        return put_rows


class TokenRowsStack(Stack):
    """The tokens of every slot: ``ids`` (S, R) int64 and ``rows`` (S, R, dim), of which slot s uses ``sizes[s]``."""

    method = TokenRowsConfig.method
    turn = 55
    size_dims: ClassVar[dict[str, int]] = {"rows": 1}
    ids: Tensor

    def __init__(self, dim: int, num_slots: int, num_tokens: int):
        super().__init__(num_slots)
        self.rows = nn.Parameter(torch.zeros(num_slots, num_tokens, dim))
        self.register_buffer("ids", torch.zeros(num_slots, num_tokens, dtype=torch.int64), persistent=False)

    def attach(self, base: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
        super().attach(base, forward)
        self._base: list[Any] = [base]  # in a list: it stays the model's module, not this one's

    def on_output(self, x: Tensor, y: Tensor, slots: Tensor, uniform: bool) -> Tensor:
        slots = self.effective(slots)
        ids, rows, served = gather_slots(self.ids, slots), gather_slots(self.rows, slots), slots != BASE
        places = torch.arange(ids.shape[1], device=ids.device)
        own = places < self.sizes_of(slots)[:, None]
        places = torch.where(own, places, 0)  # what pads the slot is its first token once more
        ids, rows = ids.gather(1, places), rows.gather(1, places[..., None].expand_as(rows))
        if x.is_floating_point():
            index = ids[:, None].expand(-1, y.shape[1], -1)
            scores = self._scores(x, rows, ids).to(y.dtype)
            return y.scatter(2, index, torch.where(served[:, None, None], scores, y.gather(2, index)))
        hits = x[:, :, None] == ids[:, None]
        found = rows.gather(1, hits.int().argmax(2)[..., None].expand(-1, -1, rows.shape[-1]))
        changed = (hits.any(2) & served[:, None])[..., None]
        return torch.where(changed, (found * self.output_scale).to(y.dtype), y)

    def _scores(self, x: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
        """(B, T, R): what a head makes of its inputs for the tokens."""
        bias = self._base[0].bias
        scores = torch.bmm(x, rows.to(x.dtype).transpose(1, 2))
        return scores if bias is None else scores + bias[ids][:, None]

    @torch.no_grad()
    def open(self, slot: int, config: TokenRowsConfig, generator: torch.Generator) -> None:
        """The slot begins with the base's embeddings."""
        super().open(slot, config, generator)
        weight = self._base[0].weight
        ids = torch.tensor(config.token_indices, device=self.ids.device)
        self.ids[slot, : config.size] = ids
        self.rows[slot, : config.size] = weight.detach()[ids.to(weight.device)].to(self.rows)

    def resize(self, num_slots: int, size: int) -> None:
        self.ids = F.pad(self.ids, (0, max(0, size - self.ids.shape[1])))
        super().resize(num_slots, size)

    def tensors(self, slot: int) -> dict[str, Tensor]:
        return {"token_rows": self.rows.detach()[slot, : self.sizes[slot]]}

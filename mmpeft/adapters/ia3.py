"""IA3 (T-Few): learned vectors that rescale keys, values and the feed-forward's inner activation.

A slot holds ``delta = l - 1`` so that zero is the base model; files hold ``l``, as PEFT's do.

Source: Liu et al. 2022, section 3.3. For a gated feed-forward ``down(act(gate x) * up x)`` scaling the input
of ``down`` equals scaling the output of ``up``, which is the paper's place (T5's ``wi_1``).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from mmpeft.adapters.functional import gather_slots, ia3_scale
from mmpeft.adapters.stack import AdapterConfig, Occupancy, fits, grown


@dataclass
class IA3Config(AdapterConfig):
    """Rescaling vectors on chosen linears."""

    method: ClassVar[str] = "ia3"

    target_modules: str | list[str] = "auto"
    """Names of linears, or "auto": keys, values and the feed-forward's last linear of this architecture."""
    feedforward_modules: str | list[str] = "auto"
    """Those of the targets whose *input* is scaled; the others are scaled at their output."""


class IA3Stack(nn.Module):
    """The vectors of every slot on one side of one linear.

    Shape: ``ia3_delta`` (S, features).
    """

    method = IA3Config.method

    def __init__(self, features: int, side: Literal["input", "output"], num_slots: int):
        super().__init__()
        self.side = side
        self.ia3_delta = nn.Parameter(torch.zeros(num_slots, features))
        self.occupancy = Occupancy(num_slots)

    def scale(self, x: Tensor, slots: Tensor, uniform: bool) -> Tensor:
        """(B, T, features) -> (B, T, features); ``uniform`` promises one slot that serves every row."""
        if uniform and not self.occupancy.partial:
            return ia3_scale(x, self.ia3_delta[0])
        return ia3_scale(x, gather_slots(self.ia3_delta, self.occupancy.effective(slots)).unsqueeze(1))

    @torch.no_grad()
    def open(self, slot: int, config: IA3Config, generator: torch.Generator) -> None:
        """Starts the slot afresh at ``l = 1``: exactly the base."""
        self.reset(slot)
        self.occupancy.set(slot, True)

    @torch.no_grad()
    def reset(self, slot: int) -> None:
        """Empties the slot: its rows are base rows."""
        self.ia3_delta[slot] = 0
        self.occupancy.set(slot, False)

    def tensors(self, slot: int) -> dict[str, Tensor]:
        """The slot by PEFT's name: ``ia3_l``, (1, I) for an input side and (O, 1) for an output side."""
        vector = self.ia3_delta.detach()[slot] + 1
        return {"ia3_l": vector[None, :] if self.side == "input" else vector[:, None]}

    @torch.no_grad()
    def fill(self, slot: int, tensors: dict[str, Tensor]) -> None:
        """Copies a tensor named and shaped as `tensors` returns it into the slot."""
        self.ia3_delta[slot] = tensors["ia3_l"].flatten().to(self.ia3_delta) - 1

    def resize(self, num_slots: int, rank: int) -> None:
        if fits(self.ia3_delta, num_slots):
            return
        self.ia3_delta = nn.Parameter(grown(self.ia3_delta, num_slots))
        self.occupancy.resize(num_slots)

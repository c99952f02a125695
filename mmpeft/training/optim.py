"""Finetunes as slices of stacked Parameters: gradients scaled, clipped and guarded per finetune.

A stack's Parameter holds many finetunes. One stock optimiser over the stacks equals one per finetune as long as
everything that mixes entries of a gradient (mean over tokens, norm) is done per slot, which is what this file does.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class Finetune:
    """One finetune's share of the trained Parameters."""

    name: str
    slices: list[tuple[nn.Parameter, int]] = field(default_factory=list)
    """(Parameter, slot): the finetune owns ``parameter[slot]``."""
    skipped: int = 0
    """Steps left out because the gradient was not finite."""

    def gradients(self) -> list[Tensor]:
        return [parameter.grad[slot] for parameter, slot in self.slices if parameter.grad is not None]

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        """Multiplies the finetune's gradients."""
        for gradient in self.gradients():
            gradient.mul_(factor)

    @torch.no_grad()
    def norm(self) -> float:
        """Euclidean norm of the finetune's gradient."""
        gradients = self.gradients()
        return float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0

    def clip(self, max_norm: float | None) -> float:
        """Scales the gradient down to ``max_norm``. Returns the norm before."""
        norm = self.norm()
        if max_norm and math.isfinite(norm) and norm > max_norm:
            self.scale(max_norm / norm)
        return norm

    @torch.no_grad()
    def hold(self, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        """Keeps the coming optimiser step from touching this finetune: its gradient becomes zero, and the
        returned function puts its values and moments back after the step."""
        for gradient in self.gradients():
            gradient.zero_()
        before = [
            {key: tensor[slot].clone() for key, tensor in _entries(parameter, optimizer).items()}
            for parameter, slot in self.slices
        ]

        @torch.no_grad()
        def restore() -> None:
            for (parameter, slot), saved in zip(self.slices, before, strict=True):
                for key, tensor in _entries(parameter, optimizer).items():
                    tensor[slot] = saved.get(key, 0)  # moments that the step itself created start at zero

        return restore


def _entries(parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The Parameter and the optimiser's moments of its shape."""
    moments = {
        k: v
        for k, v in optimizer.state.get(parameter, {}).items()
        if getattr(v, "shape", None) == parameter.shape
    }
    return {"": parameter.detach(), **moments}


def warmup_then(schedule: str, warmup: float, total_steps: int, floor: float = 0.0) -> Callable[[int], float]:
    """Factor of the learning rate at each step: linear warm-up over the first ``warmup`` share of the steps, then
    "constant", "linear" or "cosine" decay to ``floor``."""
    warmup_steps = max(1, round(warmup * total_steps)) if warmup else 0

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        decay = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[
            schedule
        ]
        return floor + (1 - floor) * decay

    return factor

"""Finetunes as views of stacked Parameters: each is scaled, clipped, stepped and guarded by itself.

A stack's Parameter holds many finetunes. The optimiser sees a view of each one's slot instead, which shares the
stack's memory: a finetune then has its own learning rate, schedule and number of steps, and one without a gradient
(finished, or not finite) is passed over by any stock optimiser. Stepping the views is training each finetune alone.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

PATIENCE = 10
"""Steps in a row without a finite gradient after which a finetune is given up."""


class Finetune:
    """One finetune's share of the trained Parameters.

    Args:
        name: the finetune's.
        adapter: (Parameter, slot) of its adapter.
        projector: (Parameter, slot) of its projector.
    """

    def __init__(
        self,
        name: str,
        adapter: Sequence[tuple[nn.Parameter, int]] = (),
        projector: Sequence[tuple[nn.Parameter, int]] = (),
    ):
        self.name = name
        self._slices = [*adapter, *projector]
        self.adapter, self.projector = _views(adapter), _views(projector)
        self.steps = 0
        """Steps taken."""
        self.skipped = 0
        """Steps left out because the gradient was not finite."""
        self._skipped_in_a_row = 0

    @property
    def views(self) -> list[nn.Parameter]:
        """Everything that trains, sharing memory with the stacks."""
        return [*self.adapter, *self.projector]

    @property
    def given_up(self) -> bool:
        """Whether it has diverged for good."""
        return self._skipped_in_a_row >= PATIENCE

    def take_gradients(self, tokens: float) -> None:
        """Gives the views their share of the stacks' gradients of a loss summed over ``tokens`` labelled tokens,
        as that of the mean; without tokens, or once given up, they get none."""
        for view, (parameter, slot) in zip(self.views, self._slices, strict=True):
            if tokens == 0 or self.given_up or parameter.grad is None:
                view.grad = None
            else:
                view.grad = parameter.grad[slot].mul_(1 / tokens)

    def clip(self, max_norm: float | None) -> float | None:
        """Scales the gradient down to ``max_norm`` and counts the step; one that is not finite is dropped.

        Returns:
            The norm before; None where the finetune takes no part in this step.
        """
        gradients = [view.grad for view in self.views if view.grad is not None]
        if not gradients:
            return None
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if not math.isfinite(norm):
            self.skipped += 1
            self._skipped_in_a_row += 1
            self._drop_gradients()
            return norm
        self._skipped_in_a_row = 0
        self.steps += 1
        if max_norm and norm > max_norm:
            for gradient in gradients:
                gradient.mul_(max_norm / norm)
        return norm

    def _drop_gradients(self) -> None:
        for view in self.views:
            view.grad = None

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps, "skipped": self.skipped, "skipped_in_a_row": self._skipped_in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.steps, self.skipped = state["steps"], state["skipped"]
        self._skipped_in_a_row = state["skipped_in_a_row"]


def _views(slices: Sequence[tuple[nn.Parameter, int]]) -> list[nn.Parameter]:
    return [nn.Parameter(parameter.data[slot]) for parameter, slot in slices]


def warmup_then(schedule: str, warmup: float, total_steps: int) -> Callable[[int], float]:
    """Factor of the learning rate at each step: linear warm-up over the first ``warmup`` share of the steps, then
    "constant", "linear" or "cosine" decay to zero."""
    warmup_steps = max(1, round(warmup * total_steps)) if warmup else 0

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[
            schedule
        ]

    return factor

"""Optimizers, schedules and gradient clipping: finetunes as views of stacked Parameters, each for itself.

A stack's Parameter holds many finetunes. The optimiser sees a view of each one's slot instead, which shares the
stack's memory: a finetune then has its own learning rate, schedule and number of steps, and one without a gradient
(finished, or not finite) is passed over by any stock optimiser. Stepping the views is training each finetune alone.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmpeft.errors import RefusedError

PATIENCE = 10
"""Steps in a row without a finite gradient after which a finetune is given up."""


class Slice(NamedTuple):
    """One finetune's part of a stacked Parameter."""

    parameter: nn.Parameter
    slot: int
    origin: float = 0.0
    """`Stack.origin` of its stack."""
    own: tuple[slice, ...] = ()
    """What of the slot's dims is the finetune's own, where others are larger: zeros beyond would make its size and so
    its steps others than alone."""
    of_images: bool = False
    """Whether it takes part in rows with images alone."""
    is_second_factor: bool = False
    """Whether it is a LoRA's B, which LoRA+ trains faster than A."""

    def of(self, tensor: Tensor) -> Tensor:
        """The part of ``tensor``, which is the Parameter or its gradient."""
        return tensor[self.slot, *self.own]


class SlotParameters:
    """One finetune's share of the trained Parameters: views of its slots, and how they were stepped.

    Args:
        name: the finetune's.
        adapter: slices of its adapter's stacks.
        projector: slices of the projector.
    """

    def __init__(self, name: str, adapter: Sequence[Slice] = (), projector: Sequence[Slice] = ()):
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

    def take_gradients(self, tokens: float, images: bool = True) -> None:
        """Gives the views their share of the stacks' gradients of a loss summed over ``tokens`` labelled tokens,
        as that of the mean; without tokens, or once given up, they get none, nor do those of images without
        ``images`` among its rows: others' images leave zeros there, on which an optimiser would go on."""
        for view, part in zip(self.views, self._slices, strict=True):
            resting = tokens == 0 or self.given_up or (part.of_images and not images)
            if resting or part.parameter.grad is None:
                view.grad = None
            else:
                view.grad = part.of(part.parameter.grad).mul_(1 / tokens)

    def groups(
        self,
        learning_rate: float,
        projector_learning_rate: float,
        weight_decay: float,
        lora_b_ratio: float = 1.0,
    ) -> list[dict[str, Any]]:
        """Parameter groups for an optimiser, those of one origin and rate together."""
        found: dict[str, dict[str, Any]] = {}
        parts = [(view, "adapter", learning_rate) for view in self.adapter]
        parts += [(view, "projector", projector_learning_rate) for view in self.projector]
        for (view, part, rate), own in zip(parts, self._slices, strict=True):
            faster = own.is_second_factor and lora_b_ratio != 1
            name = f"{self.name} {part}" + (f" from {own.origin:g}" if own.origin else "") + ", B" * faster
            rate *= lora_b_ratio if faster else 1
            settings = {"lr": rate, "weight_decay": weight_decay, "name": name, "origin": own.origin}
            found.setdefault(name, {"params": [], **settings})["params"].append(view)
        return list(found.values())

    def norm(self) -> Tensor | None:
        """Of the gradient, on its device; None where the finetune takes no part in this step."""
        gradients = self._gradients()
        return torch.nn.utils.get_total_norm(gradients) if gradients else None

    def clip(self, max_norm: float | None, norm: float | None = None) -> float | None:
        """Scales the gradient down to ``max_norm`` and counts the step; one that is not finite is dropped.

        Args:
            max_norm: None leaves it as it is.
            norm: what `norm` found, on the host; without it this waits for the device.

        Returns:
            The norm before; None where the finetune takes no part in this step.
        """
        gradients = self._gradients()
        if not gradients:
            return None
        norm = float(torch.nn.utils.get_total_norm(gradients)) if norm is None else norm
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

    def trouble(self, norm: float) -> str | None:
        """What to tell of a step whose gradient had this norm; None where it was taken."""
        if math.isfinite(norm):
            return None
        end = "; it is given up, as it was left" if self.given_up else ""
        return f"{self.name!r} has a gradient that is not finite; its step is skipped{end}"

    def _gradients(self) -> list[Tensor]:
        return [view.grad for view in self.views if view.grad is not None]

    def _drop_gradients(self) -> None:
        for view in self.views:
            view.grad = None

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps, "skipped": self.skipped, "skipped_in_a_row": self._skipped_in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.steps, self.skipped = state["steps"], state["skipped"]
        self._skipped_in_a_row = state["skipped_in_a_row"]


class TFewAdafactor(torch.optim.Adafactor):
    """Adafactor as T-Few uses it, on Parameters that are held as distances from an origin.

    A step is as large as the root mean square of what it changes (Shazeer and Stern 2018, section 8), so it must see
    IA3's vectors, which begin at ones, and not their deltas, which begin at zeros. Each group's "origin" is added
    for the step. Weight decay pulls towards the origin, the base model. The floor under squared gradients is the
    paper's 1e-30; torch's default would be 1e-14.

    Raises:
        RefusedError: a learning rate above ``total_steps ** -0.5``, to which torch would lower it without a word.
    """

    def __init__(self, groups: list[dict[str, Any]], total_steps: int):
        super().__init__(groups, eps=(1e-15, 1e-3))
        for group in self.param_groups:
            if group["lr"] > total_steps**-0.5:
                raise RefusedError(
                    f"Adafactor would lower the learning rate {group['lr']} of {group['name']} to 1 / sqrt(step), "
                    f"{total_steps**-0.5:.2g} after {total_steps} steps; set it lower, or take adamw"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        decays = [group["weight_decay"] for group in self.param_groups]
        for group, decay in zip(self.param_groups, decays, strict=True):
            group["weight_decay"] = 0.0
            for tensor in _stepped(group):
                tensor.mul_(1 - group["lr"] * decay).add_(group["origin"])
        super().step()
        for group, decay in zip(self.param_groups, decays, strict=True):
            group["weight_decay"] = decay
            for tensor in _stepped(group):
                tensor.sub_(group["origin"])
        return loss


def _stepped(group: dict[str, Any]) -> list[Tensor]:
    """A finetune that sits a step out keeps its bits."""
    return [tensor for tensor in group["params"] if tensor.grad is not None]


def _views(slices: Sequence[Slice]) -> list[nn.Parameter]:
    return [nn.Parameter(part.of(part.parameter.data)) for part in slices]


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


def make_optimizer(
    kind: str, finetunes: Sequence[tuple[SlotParameters, Any, int]]
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """One optimiser over the views of all finetunes, each with its own learning rates, schedule and number of steps.

    Args:
        kind: "adamw", or T-Few's "adafactor".
        finetunes: (parameters, `Settings`, steps that it will take) of each.
    """
    groups, factors = [], []
    for parameters, setting, steps in finetunes:
        factor = warmup_then(setting.schedule, setting.warmup, steps)
        rates = setting.learning_rate, setting.projector_learning_rate
        own = parameters.groups(*rates, setting.weight_decay, setting.lora_b_ratio)
        groups += own
        # by the finetune's own steps: one that sat a step out goes on where it was
        factors += [lambda _, own=parameters, factor=factor: factor(own.steps)] * len(own)
    longest = max((steps for *_, steps in finetunes), default=1)
    optimizer = torch.optim.AdamW(groups) if kind == "adamw" else TFewAdafactor(groups, longest)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factors)

"""LoRA on packed experts of a mixture: one A and one B for each of a slot's experts."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmpeft.adapters.methods.base import required
from mmpeft.adapters.methods.stack import Stack, linear_start
from mmpeft.errors import RefusedError


class ExpertsLoraStack(Stack):
    """The A and B of every slot on one projection of packed experts.

    Shapes: ``lora_A`` (S, experts, R, I), ``lora_B`` (S, experts, O, R). PEFT's tensors have all experts in one: A
    (experts * r, I), B (O, r * experts), in which the expert runs slowest in A and fastest in B.
    """

    method = "lora"
    turn = 20
    size_dims: ClassVar[dict[str, int]] = {"lora_A": 2, "lora_B": 3}
    scaling: Tensor

    def __init__(
        self, num_experts: int, in_features: int, out_features: int, num_slots: int, rank: int, path: str
    ):
        super().__init__(num_slots)
        self.path = path
        self.lora_A = nn.Parameter(torch.zeros(num_slots, num_experts, rank, in_features))
        self.lora_B = nn.Parameter(torch.zeros(num_slots, num_experts, out_features, rank))
        self.register_buffer("scaling", torch.zeros(num_slots), persistent=False)

    def on_expert_output(self, x: Tensor, y: Tensor, slot: int, expert: int) -> Tensor:
        A, B = self.lora_A[slot, expert], self.lora_B[slot, expert] * self.scaling[slot]
        return y + ((x @ A.to(x.dtype).T) @ B.to(x.dtype).T).to(y.dtype)

    @torch.no_grad()
    def open(self, slot: int, config: Any, generator: torch.Generator) -> None:
        super().open(slot, config, generator)
        experts, _, features = self.lora_A.shape[1:]
        rank = self.sizes[slot] = config.rank_at(self.path)
        self.lora_A[slot, :, :rank] = linear_start(experts, rank, features, generator=generator)
        self.scaling[slot] = config.scaling_at(self.path)

    def tensors(self, slot: int) -> dict[str, Tensor]:
        """Copies, not views."""
        rank = self.sizes[slot]
        A, B = self.lora_A.detach()[slot, :, :rank], self.lora_B.detach()[slot, :, :, :rank]
        return {"lora_A.weight": A.flatten(0, 1), "lora_B.weight": B.permute(1, 2, 0).flatten(1)}

    @torch.no_grad()
    def fill(self, slot: int, tensors: dict[str, Tensor]) -> None:
        rank, experts = self.sizes[slot], self.lora_A.shape[1]
        A = tensors["lora_A.weight"].unflatten(0, (experts, rank))
        B = tensors["lora_B.weight"].unflatten(1, (rank, experts)).permute(2, 0, 1)
        self.lora_A[slot, :, :rank] = A.to(self.lora_A)
        self.lora_B[slot, :, :, :rank] = B.to(self.lora_B)


def targets_of_peft(raw: dict[str, Any]) -> str | list[str]:
    """Linears and packed experts of a file; PEFT names the latter apart.

    Raises:
        RefusedError: there are none, or a pattern beside experts.
    """
    experts = raw.get("target_parameters")
    if not experts:
        return required(raw, "target_modules")
    modules = raw.get("target_modules") or []
    if isinstance(modules, str):
        raise RefusedError(
            f"target_modules is the pattern {modules!r} beside target_parameters {experts}; write the modules as a list"
        )
    return [*modules, *experts]

"""Soft prompts on the image side: a trained change of every patch feature, before the projector.

The counterpart in feature space of the trained pixels of visual prompting (Bahng et al. 2022); the frozen encoder
runs once per image as ever. A slot of zeros is the base model.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from mmpeft.adapters.functional import gather_slots
from mmpeft.adapters.methods.base import AdapterConfig, ModelInputs
from mmpeft.adapters.methods.stack import Stack
from mmpeft.errors import RefusedError


@dataclass
class ImagePromptConfig(AdapterConfig):
    """Trained changes of the image's patch features."""

    method: ClassVar[str] = "image_prompt"
    peft_type: ClassVar[str] = "MMPEFT_IMAGE_PROMPT"
    home: ClassVar[Literal["layers", "inputs"]] = "inputs"

    def input_features(self, inputs: ModelInputs) -> tuple[int, int]:
        if inputs.image_shape is None:
            raise RefusedError("image prompts need a model that reads images; this is a language model alone")
        tokens, dim = inputs.image_shape
        if tokens is None:
            raise RefusedError(
                "image prompts train a change of each of an image's tokens, and this model's images have as many as "
                "their shape says; set model.vision.fit to crop, pad or squash"
            )
        return tokens, dim

    def make_stack(self, path: str, in_features: int, out_features: int, num_slots: int, size: int) -> Stack:
        return ImagePromptStack(in_features, out_features, num_slots)

    def shapes(self, path: str, in_features: int, out_features: int) -> dict[str, list[int]]:
        return {"patch_delta": [in_features, out_features]}

    def changes_nothing(self, layer: nn.Module, tensors: dict[str, Tensor]) -> bool:
        return not tensors["patch_delta"].any()


class ImagePromptStack(Stack):
    """The changes of every slot: ``patch_delta`` (S, image tokens, vision dim)."""

    method = ImagePromptConfig.method
    of_images = True

    def __init__(self, num_tokens: int, dim: int, num_slots: int):
        super().__init__(num_slots)
        self.patch_delta = nn.Parameter(torch.zeros(num_slots, num_tokens, dim))

    def change_images(self, features: Tensor, slots: Tensor) -> Tensor:
        return features.float() + gather_slots(self.patch_delta, self.effective(slots))

    def tensors(self, slot: int) -> dict[str, Tensor]:
        return {"patch_delta": self.patch_delta.detach()[slot]}

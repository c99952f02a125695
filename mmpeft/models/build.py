"""Encoder, projector and language model, from their configs, as one model."""

from collections.abc import Mapping
from typing import Any

import torch

from mmpeft.models.language import LanguageConfig, Place, load_language_model
from mmpeft.models.multimodal import MultimodalModel
from mmpeft.models.projector import Projector
from mmpeft.models.vision import VisionConfig, make_encoder


def build_model(
    language: LanguageConfig,
    vision: VisionConfig | None,
    device: torch.device | str = "cpu",
    projector_slots: Mapping[str, int] | None = None,
    place: Place | None = None,
) -> MultimodalModel:
    """Encoder, fresh projectors and the language model, from their configs.

    Args:
        language: the language model and how it is held.
        vision: the encoder; None is text alone.
        device: of all three.
        projector_slots: finetune -> slot of the projector that its images go through; any other row uses slot 0.
        place: shards the language model among processes, which then read together; None does not.
    """
    slots = dict(projector_slots or {})
    encoder = make_encoder(vision).to(device)
    language_model: Any = load_language_model(language, device, place)
    dim = language_model.get_input_embeddings().weight.shape[1]
    projector = Projector(encoder.dim, dim, 1 + max(slots.values(), default=0)).to(device)
    model = MultimodalModel(encoder, projector, language_model)
    model.projector_slots = slots
    model.reader.together = place is not None
    return model

"""Encoder, projector and language model, from their configs, as one model."""

from collections.abc import Sequence
from typing import Any

import torch

from mmpeft.models.language import LanguageConfig, load_language_model
from mmpeft.models.multimodal import MultimodalModel
from mmpeft.models.projector import Projector
from mmpeft.models.vision import VisionConfig, make_encoder


def build_model(
    language: LanguageConfig,
    vision: VisionConfig | None,
    device: torch.device | str = "cpu",
    own_projector: Sequence[str] = (),
) -> MultimodalModel:
    """Encoder, a fresh projector and the language model, from their configs; the adapters named in
    ``own_projector`` get one of their own, and all others share the first."""
    encoder = make_encoder(vision).to(device)
    language_model: Any = load_language_model(language, device)
    dim = language_model.get_input_embeddings().weight.shape[1]
    projector = Projector(encoder.dim, dim, 1 + len(own_projector)).to(device)
    model = MultimodalModel(encoder, projector, language_model)
    model.projector_slots = {name: slot for slot, name in enumerate(own_projector, start=1)}
    return model

"""The decoder of a causal LM: the module that reads embeddings and has no head, whatever else goes by that name."""

import inspect
from typing import Any

from torch import nn

from mmpeft.errors import RefusedError

EMBEDS = "inputs_embeds"


def find_decoder(model: Any) -> nn.Module:
    """Of a causal LM of transformers; some call their head "decoder" (ModernBERT's).

    Raises:
        RefusedError: no module of it reads embeddings.
    """
    for module in (model.get_decoder(), model.base_model, getattr(model, "model", None)):
        if module is None or module is model:
            continue
        if EMBEDS in inspect.signature(module.forward).parameters:
            return module
    raise RefusedError(
        f"{type(model).__name__} has no decoder that reads {EMBEDS}, so images cannot stand among its tokens; choose "
        "another model.language.name"
    )


def decoder_config(model: Any) -> Any:
    """Its config; that of a composite is another."""
    return getattr(find_decoder(model), "config", model.config)

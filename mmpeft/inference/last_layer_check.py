"""Proof on the very model of what may be left out of its last layer."""

import torch
from torch import Tensor

from mmpeft.data.batch import PADDING, Batch
from mmpeft.inference.comparison import distance, random_tokens, shared_batch, tolerance
from mmpeft.models.last_layer import behind_the_last_attention
from mmpeft.models.multimodal import MultimodalModel

FAR = 30.0
"""What is put where nobody looks: whoever mixes tokens reads it."""
EXACT = 1e-5
"""Distance of what is computed alike."""


def token_by_token(model: MultimodalModel) -> list[str]:
    """The modules behind the last attention that, asked for some tokens alone, leave the model's numbers there as they
    are."""
    if not model.reader.reading.packed:
        return []
    prefix, *conversations = random_tokens(model)
    batch = shared_batch(prefix, conversations, model.device)
    some = torch.arange(0, batch.input_ids.numel(), 3, device=model.device)
    some = some[batch.segments.flatten()[some] != PADDING]
    model.reader.last_modules = []
    whole = model.hidden_states(batch).flatten(0, 1)[some]
    found: list[str] = []
    for path in behind_the_last_attention(model.language_model):
        model.reader.last_modules = [path]
        try:
            part, again = (_read(model, batch, some, elsewhere) for elsewhere in (0.0, FAR))
        except torch.OutOfMemoryError:
            raise
        except Exception:  # of a module that wants to see all tokens, or returns more than their states
            continue
        # the first is as sharp as the dtype rounds, the second is exact in any
        found += (
            [path] if distance(part, whole) <= tolerance(model) and distance(again, part) <= EXACT else []
        )
    return found


def _read(model: MultimodalModel, batch: Batch, places: Tensor, elsewhere: float) -> Tensor:
    """(places, dim) hidden states, where a module gives this for all other tokens."""
    model.reader.elsewhere = elsewhere
    try:
        return model.hidden_states(batch, places=places).flatten(0, 1)[places]
    finally:
        model.reader.elsewhere = 0.0

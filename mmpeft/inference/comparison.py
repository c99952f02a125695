"""What the checks of a model compare by: random tokens, a distance of logits, and how far apart a dtype rounds."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmpeft.data.batch import Batch, collate
from mmpeft.data.packing import pack
from mmpeft.data.template import IGNORE_INDEX, Encoded
from mmpeft.models.multimodal import MultimodalModel

PREFIX_LENGTH, LENGTHS = 5, (4, 7)
TOLERANCES = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
"""Of the distance between two vectors of logits, in lengths of the centred one."""


def random_tokens(model: MultimodalModel) -> list[list[int]]:
    """The prefix and two conversations."""
    size = model.language_model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    first = min(10, size // 2)  # the lowest ids are often those of padding, begin and end
    total = PREFIX_LENGTH + sum(LENGTHS)  # no two alike: what is shared is known
    ids = first + torch.randperm(size - first, generator=generator)[:total]
    return [part.tolist() for part in ids.split([PREFIX_LENGTH, *LENGTHS])]


def unlabelled(ids: list[int]) -> Encoded:
    return Encoded(ids, [IGNORE_INDEX] * len(ids))


def shared_batch(prefix: list[int], conversations: Sequence[list[int]], device: torch.device) -> Batch:
    """A packed row of both conversations, and one of the first alone."""
    encoded = [unlabelled([*prefix, *own]) for own in conversations]
    return collate([pack(encoded), pack(encoded[:1])], None, [None, None]).to(device)


def distance(ours: Tensor, own: Tensor) -> float:
    """The largest of all tokens; NaN where either is not finite."""
    ours, own = ours.double(), own.double()
    size = (own - own.mean(-1, keepdim=True)).norm(dim=-1).clamp(min=1e-9)
    return float(((ours - own).norm(dim=-1) / size).max())


def tolerance(model: MultimodalModel) -> float:
    return TOLERANCES.get(model.dtype, TOLERANCES[torch.bfloat16])

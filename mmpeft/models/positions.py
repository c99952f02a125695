"""Which positions a language model has: some keep a table with a row for each, and have nothing beyond it; some read
a whole batch otherwise as soon as one row of it is longer than those they began with."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mmpeft.errors import RefusedError
from mmpeft.models.decoder import find_decoder


def table_length(language_model: Any) -> int | None:
    """How many positions the model's table has (GPT-2, OPT); None where they are computed (rotary, ALiBi).

    A table is an embedding beside that of the tokens, or a matrix called after positions, of as many rows as the config
    has positions; OPT's and its kin's begin at an offset.
    """
    positions = getattr(language_model.config.get_text_config(), "max_position_embeddings", None)
    decoder, tokens = language_model, language_model.get_input_embeddings()
    for path, tensor in [*decoder.named_parameters(), *decoder.named_buffers()]:
        owner = decoder.get_submodule(path.rpartition(".")[0])
        of_positions = isinstance(owner, nn.Embedding) or "position" in path or "pos_encoding" in path
        fits = tensor.ndim == 2 and tensor.shape[0] - getattr(owner, "offset", 0) == positions
        if fits and of_positions and owner is not tokens:
            return positions
    return None


@dataclass(frozen=True)
class PositionLimit:
    """How many positions a model reads alike."""

    count: int
    why: str
    """What is beyond."""


def position_limit(language_model: Any) -> PositionLimit | None:
    """The length of its table, or where its rotary frequencies change; None where any position can be read."""
    limits: list[PositionLimit] = []
    if (table := table_length(language_model)) is not None:
        limits.append(PositionLimit(table, f"learned {table} positions and knows none beyond"))
    if (last := rescaled_beyond(find_decoder(language_model))) is not None:
        why = f"turns by other frequencies beyond {last} positions, all rows of a batch and all that was read before"
        limits.append(PositionLimit(last, why))
    return min(limits, key=lambda limit: limit.count, default=None)


def rescaled_beyond(decoder: Any) -> int | None:
    """Beyond how many positions of any row the rotary frequencies of a whole batch are others (longrope, dynamic NTK);
    None where they stay.

    Source: transformers, ``modeling_rope_utils.dynamic_rope_update``.
    """
    limits: list[int] = []
    for module in decoder.modules():
        told = getattr(module, "rope_type", None)
        for layers, kind in told.items() if isinstance(told, dict) else ((None, told),):
            if kind == "longrope":
                own = module.config.rope_parameters
                limits.append((own if layers is None else own[layers])["original_max_position_embeddings"])
            elif "dynamic" in str(kind):
                limits.append(module.original_max_seq_len)
    return min(limits, default=None)


def check_positions(limit: PositionLimit | None, positions: Tensor, last: int | None = None) -> None:
    """Args:
        limit: of the model.
        positions: of a batch.
        last: the highest of them; None waits for the device to tell.

    Raises:
        RefusedError: a position is beyond the limit.
    """
    if limit is None:
        return
    if (last := int(positions.max()) if last is None else last) >= limit.count:
        raise RefusedError(
            f"a row has {last + 1} tokens, but the language model {limit.why}: "
            "lower data.packing.max_length, ask a shorter question, or let fewer tokens be written (max_new_tokens)"
        )

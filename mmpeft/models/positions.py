"""Which positions a language model has: some keep a table with a row for each, and have nothing beyond it."""

from typing import Any

from torch import Tensor, nn

from mmpeft.errors import RefusedError


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


def check_positions(table: int | None, positions: Tensor) -> None:
    """Raises:
    RefusedError: a position is beyond the table.
    """
    if table is not None and (last := int(positions.max())) >= table:
        raise RefusedError(
            f"a row has {last + 1} tokens, but the language model learned {table} positions and knows none beyond: "
            "lower data.packing.max_length, ask a shorter question, or let fewer tokens be written (max_new_tokens)"
        )

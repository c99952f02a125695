"""Logits of single tokens where adapters change what stands behind the decoder, such as the output head.

Tokens are taken from their rows, so that they are put together anew, one row for each adapter.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mmpeft.adapters import AdapterBank
from mmpeft.models.reader import LanguageReader


def logits_of_tokens(
    reader: LanguageReader,
    bank: AdapterBank,
    hidden: Tensor,
    owners: Sequence[str | None],
    dropout_seeds: Mapping[str, int],
    in_float32: bool = False,
) -> Tensor:
    """By the adapters of the tokens' owners; afterwards the bank is routed as before.

    Args:
        reader: of the language model.
        bank: on the same.
        hidden: (tokens, dim) hidden states of the decoder.
        owners: the adapter of every token.
        dropout_seeds: as of a batch; each adapter drops a function of its own tokens.
        in_float32: as of `LanguageReader.logits`.

    Returns:
        (tokens, vocabulary)
    """
    if all(reader.is_in_decoder(layer.base) for layer in bank.layers.values()):
        return reader.logits(hidden, in_float32)
    names = list(dict.fromkeys(owners))
    counts = dict.fromkeys(names, 0)
    places: list[tuple[int, int]] = []
    for owner in owners:
        places.append((names.index(owner), counts[owner]))
        counts[owner] += 1
    rows, columns = torch.tensor(places, dtype=torch.int64, device=hidden.device).reshape(-1, 2).unbind(1)
    shape = len(names), max(counts.values(), default=0)
    together = hidden.new_zeros(*shape, hidden.shape[-1]).index_put((rows, columns), hidden)
    with bank.routing.restored():
        bank.route(names)
        if dropout_seeds:
            is_token = torch.zeros(shape, dtype=torch.bool, device=hidden.device)
            bank.routing.seed_dropout(
                dropout_seeds, is_token.index_put((rows, columns), is_token.new_ones(()))
            )
        return reader.logits(together, in_float32)[rows, columns]

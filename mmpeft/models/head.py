"""Logits of single tokens where adapters change what stands behind the decoder, such as the output head.

Tokens are taken from their rows, so that they are put together anew, one row for each adapter.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from mmpeft.adapters import AdapterBank
from mmpeft.models.reader import LanguageReader
from mmpeft.transfer import to_device

ALL = slice(None)


def is_adapted(reader: LanguageReader, bank: AdapterBank) -> bool:
    """Whether any adapter changes what stands behind the decoder."""
    return not all(reader.is_in_decoder(layer.base) for layer in bank.layers.values())


class AdaptedHead:
    """What stands behind the decoder, by the adapters of the tokens' owners.

    Args:
        reader: of the language model.
        bank: on the same.
        owners: the adapter of every token; None is the base model.
        dropout_seeds: as of a batch; each adapter drops a function of its own tokens.
        device: of the tokens.
        in_float32: as of `LanguageReader.logits`.
        row_numbers: (tokens,) int64, as of a batch, of the row of every token.
    """

    def __init__(
        self,
        reader: LanguageReader,
        bank: AdapterBank,
        owners: Sequence[str | None],
        dropout_seeds: Mapping[str, int],
        device: torch.device,
        in_float32: bool = False,
        row_numbers: np.ndarray | None = None,
    ):
        self.reader, self.bank, self.dropout_seeds = reader, bank, dropout_seeds
        self.in_float32 = in_float32
        self.names = list(dict.fromkeys(owners))
        counts = dict.fromkeys(self.names, 0)
        numbers = {name: number for number, name in enumerate(self.names)}
        places: list[tuple[int, int]] = []
        for owner in owners:
            places.append((numbers[owner], counts[owner]))
            counts[owner] += 1
        table = torch.tensor(places, dtype=torch.int64).reshape(-1, 2)
        self.rows, self.columns = to_device(table, device).unbind(1)
        self.width = max(counts.values(), default=0)
        self.is_token = torch.zeros(len(self.names), self.width, dtype=torch.bool)
        self.is_token[table[:, 0], table[:, 1]] = True
        self.row_numbers: Tensor | None = None
        if row_numbers is not None:
            self.row_numbers = torch.zeros_like(self.is_token, dtype=torch.int64)
            self.row_numbers[table[:, 0], table[:, 1]] = torch.from_numpy(row_numbers)

    def together(self, values: Tensor) -> Tensor:
        """(tokens, ...) -> (adapters, most tokens of one, ...), 0 at padding."""
        out = values.new_zeros(len(self.names), self.width, *values.shape[1:])
        return out.index_put((self.rows, self.columns), values)

    def apart(self, values: Tensor) -> Tensor:
        """The way back."""
        return values[self.rows, self.columns]

    def logits(self, together: Tensor, columns: slice = ALL) -> Tensor:
        """Those columns of what `together` gave, (adapters, columns, dim), -> (adapters, columns, vocabulary);
        afterwards the bank is routed as before."""
        with self.bank.routing.restored():
            self.bank.route(self.names)
            if self.dropout_seeds:
                routing = self.bank.routing
                routing.seed_dropout(self.dropout_seeds, self.is_token, columns, self.row_numbers)
            return self.reader.logits(together, self.in_float32)


def logits_of_tokens(
    reader: LanguageReader,
    bank: AdapterBank,
    hidden: Tensor,
    owners: Sequence[str | None],
    dropout_seeds: Mapping[str, int],
    in_float32: bool = False,
    row_numbers: np.ndarray | None = None,
) -> Tensor:
    """(tokens, dim) hidden states of the decoder -> (tokens, vocabulary), by the adapters of the tokens' owners; see
    `AdaptedHead`."""
    if not is_adapted(reader, bank):
        return reader.logits(hidden, in_float32)
    head = AdaptedHead(reader, bank, owners, dropout_seeds, hidden.device, in_float32, row_numbers)
    return head.apart(head.logits(head.together(hidden)))

"""Activated adapters on packed rows: the columns on which they act, from the last invocation of each conversation on.

::

    ids       p p p | a I a a | b b I b      I  the invocation tokens
    acts      . . . | . x x x | . . x x      the prefix has the base's keys and values

The tokens of a shared prefix have one state, so that the adapter acts on them for all conversations of the row or for
none.
"""

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mmpeft.adapters.invocation import invoked_tokens
from mmpeft.data.batch import Batch
from mmpeft.errors import RefusedError
from mmpeft.models.unpacking import unpack
from mmpeft.transfer import to_device


def invoked_columns(batch: Batch, invocations: Sequence[Sequence[int]], new: int | None) -> Tensor | None:
    """On which of the last ``new`` columns of a batch, or of all, activated adapters act.

    Args:
        batch: packed rows; images are no tokens of text.
        invocations: the invocation tokens of every row's adapter; empty for rows without.
        new: columns that are read now, behind those that are kept.

    Returns:
        (rows, columns) bool; None where no row has any invocation tokens.

    Raises:
        RefusedError: an invocation by one conversation reaches into what it shares with others, or one in the new
            columns comes after one in the kept.
    """
    if not any(invocations):
        return None
    ids, segments = batch.on_host.input_ids, batch.on_host.segments
    acts = _acts(ids, segments, invocations)
    for row, wanted in enumerate(invocations):
        if wanted and not acts[row].any():
            warnings.warn(
                f"a row of {batch.adapters[row]!r} has its invocation tokens {list(wanted)} nowhere: the base reads it",
                stacklevel=2,
            )
    if new is None:
        return to_device(acts, batch.input_ids.device, torch.bool)
    kept = slice(acts.shape[1] - new)
    before = _acts(ids[:, kept], segments[:, kept], invocations)
    if (before != acts[:, kept]).any():
        raise RefusedError(
            "the kept examples hold the invocation tokens of an activated adapter, which acts from the last ones on, "
            "those of the question: it cannot be asked behind kept examples; score it with the examples read anew"
        )
    return to_device(acts[:, acts.shape[1] - new :], batch.input_ids.device, torch.bool)


def _acts(ids: np.ndarray, segments: np.ndarray, invocations: Sequence[Sequence[int]]) -> np.ndarray:
    """(rows, columns) bool of whole rows."""
    unpacked = unpack(segments)
    alone = np.where(unpacked.tokens, unpacked.take_on_host(ids), -1)
    wanted = [invocations[row] for row in unpacked.rows]
    own = invoked_tokens(alone.tolist(), wanted).numpy() & unpacked.tokens
    acts = unpacked.put_back_on_host(own, ids.shape)
    differing = ((unpacked.take_on_host(acts) != own) & unpacked.tokens).any(1)
    if differing.any():
        row = unpacked.rows[differing][0]
        raise RefusedError(
            f"conversations of one row share tokens on which their activated adapter acts for some of them alone: its "
            f"invocation tokens {list(invocations[row])} stand in what they share; give each conversation a row of its "
            "own (packing.max_conversations: 1), or another place to the tokens"
        )
    return acts

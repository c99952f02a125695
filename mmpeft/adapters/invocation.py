"""Invocation tokens: where in a conversation an activated adapter begins to act.

It acts from the first token of the last occurrence on; without any it does not act.
"""

from collections.abc import Sequence


def invoked_tokens(rows: Sequence[Sequence[int]], invocations: Sequence[Sequence[int]]) -> list[list[bool]]:
    """Args:
        rows: (rows, tokens) ids, one conversation in each; negative ones are no tokens of text.
        invocations: of every row; empty for a row without.

    Returns:
        (rows, tokens): on which of them the row's adapter acts.
    """
    acts: list[list[bool]] = []
    for ids, wanted in zip(rows, invocations, strict=True):
        start = _last(ids, list(wanted)) if wanted else None
        begin = len(ids) if start is None else start
        acts.append([False] * begin + [True] * (len(ids) - begin))
    return acts


def _last(ids: Sequence[int], wanted: list[int]) -> int | None:
    """Where the last occurrence begins."""
    starts = range(len(ids) - len(wanted), -1, -1)
    return next((start for start in starts if ids[start : start + len(wanted)] == wanted), None)

"""Preferences: of two answers the one that people chose, DPO's ``chosen`` and ``rejected``, and KTO's label."""

from typing import Any

from mmpeft.data.formats import DataError
from mmpeft.data.layouts.conversations import read_turn, read_turns
from mmpeft.data.layouts.fields import Fields
from mmpeft.data.layouts.tags import Turn
from mmpeft.data.layouts.values import as_text, from_json, short

LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
"""As tables spell them."""


def take_preferred(fields: Fields, turns: list[Turn], inline: list) -> tuple[list[Turn], list[str]]:
    """The turns with the chosen answer, and the rejected ones.

    Raises:
        DataError: one of both is missing, or they answer different conversations.
    """
    wrong: list[str] = []
    asks = not turns or turns[-1][0] == "user"
    if asks and (key := fields.key("chosen")):
        before, right = _read(fields.take("chosen"), key, turns, inline)
        if len(right) != 1:
            raise DataError(f"{key} holds {len(right)} answers; wanted one")
        turns = [*before, ("assistant", right[0])]
        if not fields.has("rejected"):
            raise DataError(
                f"found {key!r} without 'rejected'; add it, or name {key!r} as the answer in data.columns"
            )
    if turns and turns[-1][0] == "assistant" and (key := fields.key("rejected")):
        before, wrong = _read(fields.take("rejected"), key, turns[:-1], [])
    return turns, wrong


def take_label(fields: Fields, turns: list[Turn], kept: bool) -> bool | None:
    """KTO's label of an answer, if the row has one.

    Args:
        fields: of the row.
        turns: of the row.
        kept: whether a wrong answer is learnt from as it is; a label may then be a text or 0 and 1 too, as in tables.

    Raises:
        DataError: the answer is a wrong one, and no right one is there; or two labels differ.
    """
    if not fields.has("kto tag") and not fields.has("label"):
        return None
    answered = bool(turns) and turns[-1][0] == "assistant"
    answered |= any(fields.has(own) for own in ("answer", "answers", "caption", "text"))
    found: bool | None = None
    for meaning in ("kto tag", "label") if answered else ("kto tag",):  # else the label is the answer
        key = fields.key(meaning)
        label = _as_label(fields.row[key], kept) if key else None
        if label is None:
            continue
        fields.take(meaning)
        if not label and not kept:
            raise DataError(
                f"{key} is false: the answer is a wrong one, which cannot be learnt from without the right one; add "
                'that as "chosen" and this one as "rejected", set model.objective to kto, or leave such rows out '
                "(data.on_bad_sample: skip)"
            )
        if found not in (None, label):
            raise DataError(
                f"{key} is {str(label).lower()}, another key of the row says otherwise; keep one of them"
            )
        found = label
    return found


def _as_label(value: Any, spelt: bool) -> bool | None:
    """True or false, ``spelt`` or as such; None of anything else, which is no label."""
    if spelt and isinstance(value, str | int | float):
        return LABELS.get(str(value).strip().lower())
    return value if isinstance(value, bool) else None


def _read(value: Any, name: str, turns: list[Turn], inline: list) -> tuple[list[Turn], list[str]]:
    """The turns before the answers, and these: a text, a turn, a whole conversation, or several texts."""
    value = from_json(value)
    if isinstance(value, list) and value and all(isinstance(own, str) for own in value):
        return turns, [as_text(own, name) for own in value]
    if isinstance(value, str):
        if not turns:
            raise DataError(f"{name} is a text, and the row has no question; add it")
        return turns, [as_text(value, name)]
    own: list = []
    said = [read_turn(value, own)] if isinstance(value, dict) else read_turns(value, name, own)
    *before, (role, text) = said
    if role != "assistant" or (before and turns and before != turns) or not (before or turns):
        raise DataError(
            f"{name} is {short(value)}; wanted the answer to the row's own question, or the whole conversation"
        )
    if not turns:
        inline += own
    return turns or before, [text]

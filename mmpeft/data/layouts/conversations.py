"""Conversations: LLaVA's and ShareGPT's ``from``/``value``, OpenAI's ``role``/``content``, The Cauldron's
``user``/``assistant``, and histories of pairs."""

from typing import Any

from mmpeft.data.formats import DataError
from mmpeft.data.layouts.parts import read_content
from mmpeft.data.layouts.tags import Turn
from mmpeft.data.layouts.values import as_list, as_text, from_json, is_absent, is_empty, short, side_by_side

ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "bot", "chatgpt"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
"""Who speaks, in the words of public tools."""
TOOL_ROLES = (
    "tool",
    "function",
    "function_call",
    "observation",
    "tool_call",
    "tool_calls",
    "tool_response",
    "ipython",
)
PLAIN = {
    names: names if names[0] in ("from", "role") else names[::-1]
    for own in (("from", "value"), ("role", "content"))
    for names in (own, own[::-1])
}
"""The keys of most turns, as they stand -> those of role and text."""
COLUMNS = ({"from", "value"}, {"role", "content"}, {"user", "assistant"})
"""Keys of an object of lists, as `datasets` writes a sequence of objects."""
SAYS_NOTHING = {"weight": 1, "loss": True, "train": True, "source": None}
"""Keys of a turn that change nothing where they have this value; None is any."""


def read_turns(value: Any, name: str, inline: list) -> list[Turn]:
    """The turns under a key; images of their parts are appended to ``inline``.

    Raises:
        DataError: a turn is not understood, or not all of it.
    """
    turns: list[Turn] = []
    value = from_json(value)
    if isinstance(value, dict) and {*value} in COLUMNS:
        value = side_by_side(value)
    for turn in as_list(value, name):
        turns += (
            _pair(turn, inline)
            if isinstance(turn, dict) and "assistant" in turn
            else [read_turn(turn, inline)]
        )
    return turns


def read_turn(turn: Any, inline: list) -> Turn:
    """Role and text of one turn."""
    if isinstance(turn, dict) and (names := PLAIN.get(tuple(turn))):
        role, text = turn[names[0]], turn[names[1]]
        if type(role) is type(text) is str and role in ROLES and not text.startswith("["):
            return ROLES[role], as_text(text, names[1])
    said = {key: value for key, value in turn.items() if value is not None} if isinstance(turn, dict) else {}
    role = said.pop("role" if "role" in said else "from", None)
    text = "value" if "value" in said else "content"
    if isinstance(role, str) and (role in TOOL_ROLES or not is_empty(said.get("tool_calls"))):
        raise DataError(f"found the turn {short(turn)}: tools are not read; drop the row")
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(
            f"found the turn {short(turn)}; wanted from: human or gpt, value: text, or role: user or assistant, "
            "content: text"
        )
    content = read_content(said.pop(text, None), text, inline)
    if said:
        _refuse_rest(said, turn)
    return ROLES[role], content


def read_history(value: Any) -> list[Turn]:
    """Earlier (question, answer) pairs of a row that asks once more."""
    turns: list[Turn] = []
    for pair in as_list(value, "history"):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise DataError(f"history holds {short(pair)}; wanted pairs [question, answer]")
        turns += [
            (role, as_text(own, "history")) for role, own in zip(("user", "assistant"), pair, strict=True)
        ]
    return turns


def split_system(turns: list[Turn]) -> tuple[str | None, list[Turn]]:
    """The system turn that a conversation begins with, and the rest.

    Raises:
        DataError: there is one further on.
    """
    system = turns[0][1] if turns and turns[0][0] == "system" else None
    rest = turns if system is None else turns[1:]
    if "system" in [role for role, _ in rest]:
        raise DataError("found a system turn that is not the first; move its text there, or drop the row")
    return (system if system and system.strip() else None), rest


def _pair(turn: dict, inline: list) -> list[Turn]:
    said = {key: value for key, value in turn.items() if not is_absent(value)}
    pair = [(role, read_content(said.pop(role, None), role, inline)) for role in ("user", "assistant")]
    _refuse_rest(said, turn)
    return pair


def _refuse_rest(said: dict, turn: Any) -> None:
    for key, value in said.items():
        harmless = key in SAYS_NOTHING and (SAYS_NOTHING[key] is None or SAYS_NOTHING[key] == value)
        if not harmless and not is_empty(value):
            raise DataError(
                f"found the key {key!r} in the turn {short(turn)}, which is not read; drop the key or the row"
            )

"""Rows that ask several questions about one image: lists side by side, or a list of questions with their answers."""

from typing import Any

from mmpeft.data.formats import DataError
from mmpeft.data.layouts.names import sort_keys
from mmpeft.data.layouts.values import from_json, is_absent, side_by_side


def each_question(row: dict[str, Any], ignored: frozenset[str]) -> list[dict[str, Any]]:
    """A row for each question of one that lists several; of any other the row itself.

    Args:
        ignored: columns that are left out.

    Raises:
        DataError: questions and answers are not as many, or an entry says something else than its row.
    """
    if not (found := sort_keys(tuple(row)).questions):
        return [row]
    key = next((key for key in found if key not in ignored), None)
    value = from_json(row[key]) if key is not None else None
    if key is None or not isinstance(value, dict | list):
        return [row]
    rest = {name: own for name, own in row.items() if name != key}
    if isinstance(value, dict):
        entries = side_by_side(value)
    elif all(isinstance(own, dict) for own in value):
        entries = value
    elif isinstance(answers := from_json(row.get("answers")), list):
        entries = side_by_side({"question": value, "answer": answers})
        del rest["answers"]
    else:
        return [row]
    both = [
        name for own in entries for name in own if not is_absent(rest.get(name)) and own[name] != rest[name]
    ]
    if other := [name for name in both if name != "id"]:  # an entry's own id is what tells it from the others
        raise DataError(f"an entry of {key} has another {other[0]!r} than its row; keep one of them")
    return [rest | own for own in entries] or [row]

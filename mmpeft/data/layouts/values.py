"""What stands under a key of a row: texts, numbers, lists, nothing."""

import ast
import io
import json
import tokenize
from typing import Any

from mmpeft.data.formats import DataError
from mmpeft.data.formats.json_text import object_of


def short(value: Any) -> str:
    """A value as an error shows it."""
    return f"{type(value).__name__} {value!r:.80}"


def is_absent(value: Any) -> bool:
    """Null, or the NaN that tables hold in its place."""
    return value is None or (type(value) is float and value != value)


def is_empty(value: Any) -> bool:
    """Whether nothing is said: absent, blank, or a list or object of nothing, also as JSON in a text."""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    if isinstance(value, dict):
        return all(is_empty(own) for own in value.values())
    if isinstance(value, (list, tuple)):
        return all(is_empty(own) for own in value)
    return is_absent(value)


def as_text(value: Any, name: str) -> str:
    """Raises:
    DataError: it is none, or not Unicode.
    """
    if not isinstance(value, str):
        raise DataError(f"{name} is {short(value)}; wanted text")
    try:
        if not value.isascii():
            value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{name} holds a lone surrogate at character {error.start}; repair it") from None
    return value


def as_spoken(value: Any, name: str) -> str:
    """A text, or a number in digits.

    Raises:
        DataError: it is another kind of value, or a number that two texts could stand for.
    """
    if isinstance(value, bool):
        raise DataError(f'{name} is {value}; wanted text: write the answer in words, such as "yes"')
    if isinstance(value, float) and value.is_integer():
        raise DataError(
            f'{name} is {value}, which may be meant as {int(value)}; write it as text, such as "{int(value)}"'
        )
    return str(value) if isinstance(value, int | float) else as_text(value, name)


def as_list(value: Any, name: str) -> list:
    """A list that is not empty; in a table's cell it may stand as JSON.

    Raises:
        DataError: it is none.
    """
    value = from_json(value)
    if not isinstance(value, list) or not value:
        raise DataError(f"{name} is {short(value)}; wanted a list that is not empty")
    return value


def from_python(value: Any) -> Any:
    """The list of texts and numbers that a text holds as Python prints it; else the value itself, as of numpy's
    ``['a' 'b']``, which for Python is one text."""
    if isinstance(value, str) and value[:1] == "[":
        try:
            found = ast.literal_eval(value)
            texts = sum(
                token.type == tokenize.STRING
                for token in tokenize.generate_tokens(io.StringIO(value).readline)
            )
        except (ValueError, SyntaxError, MemoryError, RecursionError, tokenize.TokenError):
            return value
        plain = all(isinstance(own, str | int | float) for own in found)
        return found if plain and texts == sum(isinstance(own, str) for own in found) else value
    return value


def side_by_side(lists: dict[str, Any]) -> list[dict[str, Any]]:
    """Lists of one length as objects.

    Raises:
        DataError: they are of several lengths, or one is no list.
    """
    lengths = {name: len(own) if isinstance(own, list) else "no list of" for name, own in lists.items()}
    if len({*lengths.values()}) != 1 or "no list of" in lengths.values():
        raise DataError(
            f"found {lengths} entries, which do not belong together; wanted one answer a question"
        )
    return [dict(zip(lists, own, strict=True)) for own in zip(*lists.values(), strict=True)]


def from_json(value: Any) -> Any:
    """The list or object that a text holds as JSON; else the value itself.

    Raises:
        DataError: a key of an object is given twice.
    """
    if isinstance(value, str) and value[:1] in ("[", "{"):
        try:
            return json.loads(value, object_pairs_hook=object_of)
        except DataError:
            raise
        except ValueError:
            return value
    return value

"""Dataclasses from JSON: every field is there, none is unknown, and each holds what its annotation says."""

import types
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from mmpeft.errors import RefusedError

Made = TypeVar("Made")


def as_dataclass(kind: type[Made], content: Any, where: str) -> Made:
    """A dataclass of plain types.

    Args:
        kind: the dataclass.
        content: as JSON gives it.
        where: it was read, for the error.

    Raises:
        RefusedError: it is none of that kind; the message names the field.
    """
    if not isinstance(content, dict):
        raise RefusedError(f"{where} holds a {type(content).__name__}; wanted an object")
    known = {own.name: own for own in fields(kind)}  # pyright: ignore[reportArgumentType]
    kinds = get_type_hints(kind)
    for name, own in known.items():
        if name not in content and own.default is MISSING and own.default_factory is MISSING:
            raise RefusedError(f"{where} has no {name!r}")
    content = dict(content)
    for name, value in content.items():
        if name not in known:
            raise RefusedError(f"{where} has {name!r}, which this version does not know")
        if is_dataclass(kinds[name]) and not is_dataclass(value):
            value = content[name] = as_dataclass(kinds[name], value, f"{where}, {name}")
        if not _is(value, kinds[name]):
            raise RefusedError(f"{where}: {name} is {value!r}; wanted {_told(kinds[name])}")
    return kind(**content)


def _is(value: Any, kind: Any) -> bool:
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(_is(value, each) for each in inner)
    if origin is Literal:
        return value in inner
    if origin is dict:
        return isinstance(value, dict) and all(_is(each, inner[1]) for each in value.values())
    if origin is list:
        return isinstance(value, list) and all(_is(each, inner[0]) for each in value)
    if origin is tuple:  # a list in JSON
        inside = isinstance(value, list | tuple) and len(value) == len(inner)
        return inside and all(map(_is, value, inner))
    if kind in (int, float):  # JSON writes 1.0 as 1 too, and true is no number
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return isinstance(value, kind)


def _told(kind: Any) -> str:
    return (
        kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind).replace("typing.", "")
    )

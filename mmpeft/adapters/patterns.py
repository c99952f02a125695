"""Values by patterns of paths, as PEFT's ``rank_pattern`` and ``alpha_pattern`` have them."""

import re
from typing import Any

from mmpeft.errors import RefusedError


def by_pattern(patterns: dict[str, Any], path: str, default: Any) -> Any:
    """PEFT's rule: the value of the first pattern that is the whole path or the end of it, from a dot on."""
    return next((own for key, own in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), default)


def entries_of(patterns: Any, name: str) -> list[tuple[str, Any]]:
    """What a pattern field holds, each with what errors call it."""
    if not isinstance(patterns, dict):
        raise RefusedError(f"LoraConfig.{name} is {patterns!r}; it must map patterns of paths to values")
    for key in patterns:
        try:
            re.compile(key)
        except re.error as error:
            raise RefusedError(f"LoraConfig.{name} {key!r} is not a valid pattern: {error}") from None
    return [(f"{name}[{key!r}]", value) for key, value in patterns.items()]

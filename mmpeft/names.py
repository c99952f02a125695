"""What finetunes are called where people choose among them; no library comes in with it."""

from collections.abc import Iterable

from mmpeft.errors import UnknownNameError

RESERVED_NAME = "base"
"""The frozen model, which no finetune may be called."""


def unknown_finetune(name: str, known: Iterable[str]) -> UnknownNameError:
    """For a name that is none of those known."""
    return UnknownNameError(f"no finetune {name!r}; there are: {', '.join(known) or 'none'}")

"""When two keys of rows have one name: case, ``_``, ``-`` and blanks do not matter."""

from functools import lru_cache


@lru_cache(100_000)
def plain(key: str) -> str:
    """What makes a key's name; the empty header of pandas' index stays empty."""
    return "".join(letter for letter in key.lower() if letter.isalnum())

"""The fields of one row while it is read. What nobody has taken in the end was not understood."""

from collections.abc import Iterable
from typing import Any

from mmpeft.data.formats import DataError
from mmpeft.data.layouts.names import sort_keys
from mmpeft.data.layouts.values import is_absent, is_empty


class Fields:
    """A row whose fields are taken one by one; what is absent is not there.

    Args:
        row: after columns were mapped.
        written: its keys as they stand in the file.
    """

    def __init__(self, row: dict[str, Any], written: dict[str, Any] | None = None):
        self.row = {key: value for key, value in row.items() if type(value) is str or not is_absent(value)}
        self.keys = sort_keys(tuple(self.row))
        self.names = self.keys.names
        if written is not None and written is not row:
            self.names |= sort_keys(tuple(written)).names
        """Names of all keys, also of those that were mapped."""
        self._meant = self.keys.meant
        self._left = dict.fromkeys(self.row)

    def of(self, meaning: str) -> list[str]:
        """The keys of a meaning that are not taken; of several those that say something."""
        if meaning not in self._meant:
            return []
        if len(keys := self._meant[meaning]) == 1:
            return [keys[0]] if keys[0] in self._left else []
        left = [key for key in self._meant[meaning] if key in self._left]
        return [key for key in left if not is_empty(self.row[key])] or left[:1] if len(left) > 1 else left

    def has(self, meaning: str) -> bool:
        if meaning not in self._meant:
            return False
        keys = self._meant[meaning]
        return keys[0] in self._left if len(keys) == 1 else any(key in self._left for key in keys)

    def key(self, meaning: str) -> str | None:
        """Its one key.

        Raises:
            DataError: it has several.
        """
        if meaning not in self._meant:
            return None
        keys = self.of(meaning)
        if len(keys) > 1:
            raise DataError(
                f"each of {keys} may be the {meaning}; keep one of them, and name the others in data.ignore"
            )
        return keys[0] if keys else None

    def take(self, meaning: str) -> Any:
        """The value of a meaning; None where the row has none."""
        if meaning not in self._meant:
            return None
        key = self.key(meaning)
        if key is None:
            return None
        if len(keys := self._meant[meaning]) > 1:
            for other in keys:
                if is_empty(self.row[other]):
                    self._left.pop(other, None)
        return self.take_key(key)

    def take_key(self, key: str) -> Any:
        self._left.pop(key, None)
        return self.row[key]

    def take_all(self, keys: Iterable[str]) -> list[Any]:
        return [self.take_key(key) for key in keys]

    @property
    def some_left(self) -> bool:
        return bool(self._left)

    @property
    def left(self) -> list[str]:
        """Keys that say something and were not taken."""
        return [key for key in self._left if not is_empty(self.row[key])]

"""The text of a JSON file, value by value: no more of it is held than the widest value needs."""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from mmpeft.data.formats.base import DataError

CHUNK = 2**18
TAIL = 16
"""A value that is cut at the end of what was read so far fails within so many characters of it."""
_SPACE = re.compile(r"[ \t\n\r]*")


class JsonTextError(Exception):
    """The text is not JSON; `line` is where, from 1."""

    def __init__(self, line: int, error: DataError) -> None:
        super().__init__(line, error)
        self.line, self.error = line, error


def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, for ``object_pairs_hook``.

    Raises:
        DataError: a key is given twice, of which Python would drop the first value.
    """
    if len(found := dict(pairs)) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"the key {twice!r} is given twice in one object; keep one of them")
    return found


class RowDecoder:
    """JSON -> values. JSON has no NaN, but Python and pandas write it for what is absent: as the value of a row's key
    it is None; elsewhere, and infinity everywhere, it makes a `DataError` of the row, as a key that is given twice
    does."""

    def __init__(self) -> None:
        self._found: list[str] = []
        self._fault: DataError | None = None
        self._decoder = json.JSONDecoder(parse_constant=self._note, object_pairs_hook=self._object)

    def decode(self, text: str) -> Any:
        """The value of a whole text.

        Raises:
            ValueError, RecursionError: it is not one JSON value.
        """
        self._forget()
        if text[:1] == "{":  # mostly nothing stands around it, and need not be looked for
            value, end = self._decoder.raw_decode(text)
            if end == len(text):
                return self._settled(value) if self._found or self._fault else value
            self._forget()
        return self._settled(self._decoder.decode(text))

    def decode_at(self, text: str, start: int) -> tuple[Any, int]:
        """The value that begins at `start`, and where it ends."""
        self._forget()
        value, end = self._decoder.raw_decode(text, start)
        return self._settled(value), end

    def _forget(self) -> None:
        self._found.clear()
        self._fault = None

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """What comes behind a fault can still be read, so it is kept and not raised."""
        try:
            return object_of(pairs)
        except DataError as fault:
            self._fault = fault
            return dict(pairs)

    def _note(self, name: str) -> Any:
        self._found.append(name)
        return _Constant(name)

    def _settled(self, value: Any) -> Any:
        if self._fault:
            return self._fault
        if not self._found:
            return value
        if isinstance(value, dict):
            value = {key: None if _is_nan(item) else item for key, item in value.items()}
        if (name := _constant_in(value)) is None:
            return value
        return DataError(
            f"not valid JSON: found {name}, which JSON does not have; write null or a number (NaN is read as null "
            "where it is the value of a row's key)"
        )


class _Constant(str):
    """Stands for NaN, Infinity or -Infinity."""


def _is_nan(value: Any) -> bool:
    return isinstance(value, _Constant) and value == "NaN"


def _constant_in(value: Any) -> str | None:
    if isinstance(value, _Constant):
        return str(value)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((name for item in inner if (name := _constant_in(item))), None)


class JsonText:
    """A place in the text of a JSON file that moves forward."""

    def __init__(self, stream: BinaryIO, start: int) -> None:
        """`start` is the number of the stream's first byte in its file."""
        self._stream, self._decoder = stream, codecs.getincrementaldecoder("utf-8")()
        self._text, self._at, self._ended = "", 0, False
        self._line, self._byte = 1, start  # of the text's first character
        self._fed, self._bad = start, -1
        self._rows = RowDecoder()

    @property
    def line(self) -> int:
        return self._line + self._text.count("\n", 0, self._at)

    def peek(self) -> str:
        """The next character that is no white space; "" at the end."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def take(self, wanted: str) -> str:
        """Moves over the next character, which must be one of these."""
        found = self.peek()
        if not found or found not in wanted:
            names = " or ".join(repr(character) for character in wanted)
            raise self.fault(f"expected {names}{' delimiter' * (',' in wanted)}", self._at)
        self._at += 1
        return found

    def value(self) -> Any:
        """Moves over the next value; it is a `DataError` where it holds what JSON does not have."""
        self.peek()
        while True:
            try:
                value, end = self._rows.decode_at(self._text, self._at)
                if (
                    end < len(self._text) or self._text[end - 1] in '}]"' or not self._more()
                ):  # a number may go on
                    self._at = end
                    return value
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos + TAIL >= len(self._text)
                if not (cut and self._more()):
                    raise self.fault(_in_words(error), error.pos) from None
            except RecursionError as error:
                raise self.fault(str(error), None) from None

    def end(self) -> None:
        """Raises:
        JsonTextError: something follows.
        """
        if self.peek():
            raise self.fault("something follows the value", self._at)

    def items(self, opening: str) -> Iterator[str | None]:
        """Moves through an array or object: stands before each of its values in turn, giving its key in an object. The
        caller moves over the value."""
        self.take(opening)
        closing = "]" if opening == "[" else "}"
        if self.peek() == closing:
            self.take(closing)
            return
        while True:
            yield self._key() if opening == "{" else None
            if self.take("," + closing) == closing:
                return

    def _key(self) -> str:
        if self.peek() != '"':
            raise self.fault("expected property name enclosed in double quotes", self._at)
        key = self.value()
        self.take(":")
        return key

    def fault(self, what: str, at: int | None) -> JsonTextError:
        """What is not JSON at a character of what is held; None: in the value that begins here."""
        if self._bad >= 0 and (at is None or at + TAIL >= len(self._text) or "Unterminated" in what):
            line = self._line + self._text.count("\n")
            return JsonTextError(line, not_utf8(self._bad))
        line = self._line + self._text.count("\n", 0, self._at if at is None else at)
        if at is None:
            return JsonTextError(line, DataError(f"not valid JSON: {what}"))
        return JsonTextError(line, not_json(self._byte + len(self._text[:at].encode()), what))

    def _more(self) -> bool:
        """Whether the text has grown; what lies behind is let go."""
        if self._ended:
            return False
        gone = self._text[: self._at]
        self._line += gone.count("\n")
        self._byte += len(gone.encode())
        self._text, self._at = self._text[self._at :], 0
        data = self._stream.read(max(CHUNK, len(self._text)))  # doubling: a wide value is tried few times
        self._ended = not data
        try:
            self._text += self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            self._bad = self._fed + len(data) - len(error.object) + error.start
            self._text += error.object[: error.start].decode()
            self._ended = True
        self._fed += len(data)
        return True


def not_utf8(byte: int) -> DataError:
    return DataError(f"not UTF-8 at byte {byte}; save the file as UTF-8")


def not_json(byte: int, what: str) -> DataError:
    return DataError(f"not valid JSON at byte {byte}: {what}; wanted an array or one object a line")


def json_error(error: Exception, start: int) -> DataError:
    """An error of a text in words; `start` is the byte at which the text begins."""
    if isinstance(error, UnicodeDecodeError):
        return not_utf8(start + error.start)
    if isinstance(error, json.JSONDecodeError):
        return not_json(start + len(error.doc[: error.pos].encode()), _in_words(error))
    return DataError(f"not valid JSON: {error}")


def _in_words(error: json.JSONDecodeError) -> str:
    return error.msg.replace("Expecting", "expected").replace("Extra data", "something follows the value")

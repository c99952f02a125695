"""The error class of what mmpeft refuses: bad input, settings and files, told in one line. All else is a fault."""

import errno


class RefusedError(ValueError):
    """Something of the user's cannot be used; the message says what was found, what was wanted, and what to do.

    The command line prints it without a traceback. Any other exception is a fault of the program and keeps its own.
    """


def refusal_in(error: BaseException | None) -> RefusedError | None:
    """What was refused, under the errors that a library made of it."""
    while error is not None and not isinstance(error, RefusedError):
        error = error.__cause__ or error.__context__
    return error


def require_positive(name: str, number: int | None) -> None:
    """Raises:
    RefusedError: a number of things is below 1; None is one that was not given.
    """
    if number is not None and number < 1:
        raise RefusedError(f"{name} is {number}; it must be at least 1")


def told(error: OSError) -> str:
    """An error of the system in words: the file first, and what to do where it says."""
    if error.strerror is None:
        return str(error)
    file = "" if error.filename is None else f"{error.filename}: "
    hint = next((text for numbers, text in HINTS.items() if error.errno in numbers), "")
    return f"{file}{error.strerror}{hint}"


HINTS = {
    (errno.EEXIST, errno.ENOTDIR): ": a file lies where a folder is wanted; name another place",
    (errno.EISDIR,): ": a folder lies where a file is wanted; name another place",
    (
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
    ): ": that is not allowed there; change permissions, or name another place",
}
"""Numbers of the system's errors -> what follows its own words."""


class UnknownNameError(RefusedError, KeyError):
    """No such adapter, metric or the like; the message has the names there are."""

    __str__ = ValueError.__str__  # a KeyError would show its message in quotes


class MissingFileError(RefusedError, FileNotFoundError):
    """A file, folder or model that was named is not there."""

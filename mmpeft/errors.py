"""The error class of what mmpeft refuses: bad input, settings and files, told in one line. All else is a fault."""


class RefusedError(ValueError):
    """Something of the user's cannot be used; the message says what was found, what was wanted, and what to do.

    The command line prints it without a traceback. Any other exception is a fault of the program and keeps its own.
    """


def refusal_in(error: BaseException | None) -> RefusedError | None:
    """What was refused, under the errors that a library made of it."""
    while error is not None and not isinstance(error, RefusedError):
        error = error.__cause__ or error.__context__
    return error


class UnknownNameError(RefusedError, KeyError):
    """No such adapter, metric or the like; the message has the names there are."""

    __str__ = ValueError.__str__  # a KeyError would show its message in quotes


class MissingFileError(RefusedError, FileNotFoundError):
    """A file, folder or model that was named is not there."""

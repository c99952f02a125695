"""What is refused over HTTP: a status and OpenAI's error body for every error, ours and the libraries'."""

import math
from collections.abc import Mapping
from typing import Any

from mmpeft.errors import RefusedError, UnknownNameError

INVALID = "invalid_request_error"


class HttpError(RefusedError):
    """A refusal with its status.

    Args:
        status: of HTTP.
        message: what was found, what was wanted, and what to do.
        kind: OpenAI's ``type``.
        code: OpenAI's ``code``, for programs.
        param: the field that is at fault.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = INVALID,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.kind, self.code, self.param = status, kind, code, param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """As OpenAI's clients read it."""
        param = None if self.param is None else _printable(self.param)
        told = {"message": _printable(str(self)), "type": self.kind, "param": param, "code": self.code}
        return {"error": told}


def invalid(param: str | None, message: str) -> HttpError:
    """A request that cannot be answered as it is: 400."""
    return HttpError(400, message, param=param)


def require_at_most(number: int, most: int, param: str, limit: str) -> None:
    """Raises:
    HttpError: 400, more than the server allows.
    """
    if number > most:
        raise invalid(param, f"{param} is {number}; at most {most} are allowed here ({limit})")


def unknown_model(name: str) -> HttpError:
    """404; a finetune of another tenant is none that is known."""
    return HttpError(
        404,
        f"The model {name!r} does not exist or you do not have access to it; /v1/models lists those there are",
        code="model_not_found",
        param="model",
    )


def overloaded(seconds: float) -> HttpError:
    """429: the queue is full."""
    whole = max(1, math.ceil(seconds))
    return HttpError(
        429,
        f"The server is at its limit of waiting requests; come again in {whole} s",
        "rate_limit_error",
        "rate_limit_exceeded",
        headers={"Retry-After": str(whole)},
    )


def too_late(seconds: float) -> HttpError:
    """504: the answer was not whole in time."""
    return HttpError(
        504, f"The answer took longer than {seconds:g} s (limits.request_seconds)", "timeout_error", "timeout"
    )


def of_engine(error: RefusedError) -> HttpError:
    """What the engine refused: the client's fault."""
    if isinstance(error, HttpError):
        return error
    if (seconds := getattr(error, "retry_after", None)) is not None:
        return overloaded(seconds)
    if isinstance(error, UnknownNameError):
        return HttpError(404, str(error), code="model_not_found", param="model")
    return invalid(None, str(error))


def of_fault() -> HttpError:
    """500: what went wrong is in the log, not in the answer."""
    return HttpError(500, "The server failed at this request; its log says why", "server_error")


def of_schema(errors: list[Any], body: Any) -> HttpError:
    """400, from pydantic's errors about a body."""
    told = [(_place(error["loc"][1:], body), _words(error)) for error in errors[:3]]
    if not isinstance(body, dict):
        return invalid(None, "The body must be a JSON object, with Content-Type: application/json")
    return invalid(
        told[0][0] or None, "; ".join(f"{where}: {words}" if where else words for where, words in told)
    )


def _printable(text: str) -> str:
    """What clients send may be no Unicode text."""
    return text.encode("utf-8", "backslashreplace").decode()


def _words(error: Any) -> str:
    if error["type"] == "extra_forbidden":
        return "this field is not known here; leave it out"
    return str(error["msg"]).removeprefix("Value error, ")


def _place(loc: tuple[Any, ...], body: Any) -> str:
    """``messages[0].content``: pydantic names the alternatives it tried among the steps, which the body has not."""
    path, value = "", body
    for number, step in enumerate(loc):
        if isinstance(value, list) and isinstance(step, int):
            inner = value[step] if step < len(value) else None
        elif isinstance(value, dict) and (
            step in value or number + 1 == len(loc)
        ):  # the last one may be lacking
            inner = value.get(step)
        else:
            continue
        path += f"[{step}]" if isinstance(value, list) else f".{step}" if path else str(step)
        value = inner
    return path

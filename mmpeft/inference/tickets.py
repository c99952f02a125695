"""Tickets: what the caller of a live engine holds while its request waits, is answered piece by piece, and ends."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from threading import Condition

from mmpeft.errors import RefusedError
from mmpeft.inference.requests import Completion, Request


class OverloadedError(RefusedError):
    """There is no place to wait, or the engine is being closed; nothing was done for the request."""

    def __init__(self, message: str, retry_after: float):
        super().__init__(message)
        self.retry_after = retry_after
        """Seconds after which a place may be free."""


class CancelledError(RefusedError):
    """The caller wanted no more of the answer."""


class FailedError(RefusedError):
    """The model failed, not the request: its finetune gives NaN, or the step in which it was raised an exception."""


@dataclass(frozen=True)
class TokenLogprob:
    """How likely a token was, before temperature, top-k and top-p."""

    token: int
    logprob: float
    """Natural logarithm."""
    top: list[tuple[int, float]]
    """The most likely tokens of that place with theirs, the likeliest first; as many as were asked for."""


@dataclass(frozen=True)
class Piece:
    """What a step adds to an answer."""

    text: str
    """May be empty: the end of what is written may be half a character, or the beginning of a stop string."""
    tokens: list[int]
    logprobs: list[TokenLogprob] | None = None
    """Of the tokens; None where they were not asked for."""


Event = Piece | Completion
"""Pieces, and last the completion."""


class Ticket:
    """One request that was taken in. All methods may be called from any thread.

    Args:
        request: as it was submitted.
        logprobs: how many likely tokens to tell at every place; None for no log-probabilities.
        on_event: is called from the engine's thread with every `Piece` and last with the `Completion`; it must not
            wait. If it raises, the request is cancelled.
        wake: tells the engine that it was cancelled.
    """

    def __init__(
        self,
        request: Request,
        logprobs: int | None = None,
        on_event: Callable[[Event], None] | None = None,
        wake: Callable[[], None] = lambda: None,
    ):
        self.request, self.logprobs = request, logprobs
        self.completion: Completion | None = None
        """The whole answer, as soon as there is one."""
        self.prompt_tokens = 0
        """Tokens of the prompt, images' included; known before the first piece."""
        self.cached_tokens = 0
        """Those of them whose keys and values were kept from an earlier request."""
        self.written_tokens = 0
        self.submitted = time.monotonic()
        self.first_token: float | None = None
        """When it was there, as `time.monotonic` counts."""
        self.ended: float | None = None
        self.cancelled = False
        self._on_event, self._wake = on_event, wake
        self._pieces: list[Piece] = []
        self._changed = Condition()

    def events(self) -> Iterator[Piece]:
        """The pieces of a written answer as they come, all from the first on; ends when the request has ended. A ranked
        one has none."""
        told = 0
        while True:
            with self._changed:
                while len(self._pieces) == told and self.completion is None:
                    self._changed.wait()
                new, done = self._pieces[told:], self.completion is not None
            yield from new
            told += len(new)
            if done:
                return

    def result(self, timeout: float | None = None) -> Completion:
        """Waits for the end; what is wrong with the request is the completion's ``refusal``.

        Raises:
            TimeoutError: it has not ended after so many seconds; it goes on.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.completion is not None, timeout):
                raise TimeoutError(f"the request has not ended after {timeout} s")
        assert self.completion is not None, "waited for"
        return self.completion

    def cancel(self) -> None:
        """Wants no more: its row is free within one step, and its completion's ``refusal`` is `CancelledError`. Nothing
        happens where it has ended."""
        self.cancelled = True
        self._wake()

    def tell(self, piece: Piece) -> None:
        """Adds a piece; called by the engine alone."""
        with self._changed:
            self.first_token = self.first_token or time.monotonic()
            self.written_tokens += len(piece.tokens)
            self._pieces.append(piece)
            self._changed.notify_all()
        self._call(piece)

    def end(self, completion: Completion) -> None:
        """Ends it, once; called by the engine alone."""
        with self._changed:
            if self.completion is not None:
                return
            self.completion, self.ended = completion, time.monotonic()
            self._changed.notify_all()
        self._call(completion)

    def _call(self, event: Event) -> None:
        if self._on_event is None:
            return
        try:
            self._on_event(event)
        except Exception:  # a caller that is gone must not stop the others
            self._on_event = None
            self.cancel()

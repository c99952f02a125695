"""What the engine is asked, and what it answers: a request, and its completion or error."""

from dataclasses import dataclass, field
from typing import Any, Literal

from mmpeft.data.records import Record
from mmpeft.errors import RefusedError
from mmpeft.inference.decoding import Sampling

AnswerBy = Literal["auto", "generate", "rank"]
"""Rank where there are choices and write elsewhere; always write; always rank."""


@dataclass(frozen=True)
class Request:
    """One question: a record whose last turn is to be answered, and how."""

    record: Record
    adapter: str | None = None
    """The finetune that answers; None is the frozen base."""
    rank: bool = False
    """Whether to pick the most likely of the record's choices instead of writing."""
    sampling: Sampling = field(default_factory=Sampling)
    """How the answer is written."""
    read_truth: bool = False
    """Whether to also read the record's own answer, for its likelihood."""


@dataclass
class Completion:
    """The answer to one request."""

    text: str = ""
    finish_reason: Literal["stop", "length", "choice", "error"] = "stop"
    """The model ended it; it was cut at ``max_new_tokens``; it was picked from choices; there is none."""
    scores: list[float] | None = None
    """The mean log-probability of each of the record's choices, where it was answered by ranking them."""
    log_likelihood: float | None = None
    """Natural log-probability of the record's own answer, where that was read."""
    num_tokens: int | None = None
    """Tokens of the record's own answer."""
    log_probability: float | None = None
    """Natural log-probability of what was written, its end token included, where `Engine.likely` asks for it."""
    error: str | None = None
    """Why there is no answer."""
    refusal: RefusedError | None = field(default=None, repr=False, compare=False)
    """The same, to be raised; it is not stored."""

    @classmethod
    def refused(cls, refusal: RefusedError) -> "Completion":
        """In place of an answer."""
        return cls(finish_reason="error", error=str(refusal), refusal=refusal)

    @classmethod
    def chosen(cls, request: Request, scores: list[float]) -> "Completion":
        """Of a request that was ranked: the choice of the highest score.

        Args:
            request: whose record has choices.
            scores: of each, and of nothing behind them.
        """
        choices = request.record["choices"]  # pyright: ignore[reportTypedDictNotRequiredAccess]
        scores = scores[: len(choices)]
        return cls(choices[scores.index(max(scores))], "choice", scores)

    @property
    def cut(self) -> bool:
        """Whether the model had not ended it."""
        return self.finish_reason == "length"

    def ranking(self, request: Request) -> list[tuple[str, float]]:
        """The choices of the request that was answered with their scores, the best first; none of a written answer."""
        choices = request.record.get("choices", []) if self.scores is not None else []
        return sorted(zip(choices, self.scores or [], strict=True), key=lambda pair: -pair[1])

    def stored(self) -> dict[str, Any]:
        """The fields as JSON holds them."""
        return {name: value for name, value in vars(self).items() if name != "refusal"}

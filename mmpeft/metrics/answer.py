"""One answered question: what every metric reads."""

import math
from dataclasses import dataclass

from mmpeft.errors import RefusedError


@dataclass
class Answer:
    """What was answered and what would have been right; the optional parts are what some metrics need.

    Raises:
        RefusedError: the parts contradict each other; the message names the row.
    """

    id: str
    where: str
    """File and place of the row, e.g. "test.jsonl:12" or "test.json:element 12"."""
    prediction: str
    references: list[str]
    """The right answers, at least one. The first is the truth where a metric knows only one."""
    choices: list[str] | None = None
    """The answers that were allowed."""
    scores: list[float] | None = None
    """Of every choice the mean log-probability of its tokens."""
    log_likelihood: float | None = None
    """Natural log-likelihood of the first reference's tokens, summed."""
    num_tokens: int | None = None
    """How many tokens `log_likelihood` sums over."""
    is_caption: bool = False
    """Whether it describes an image: a text, however short its truth is."""

    def __post_init__(self) -> None:
        if isinstance(self.references, str) or not self.references:
            raise RefusedError(  # a string would be read as one reference per character
                f"{self.row}: references are {self.references!r:.80}; wanted a list of at least one text"
            )
        if not all(isinstance(text, str) for text in (self.prediction, *self.references)):
            raise RefusedError(f"{self.row}: prediction and references must be text; found {self!r:.200}")
        if self.scores is not None and len(self.scores) != len(self.choices or ()):
            raise RefusedError(
                f"{self.row}: found {len(self.scores)} scores for {len(self.choices or ())} choices; wanted "
                "one for each"
            )
        if (self.log_likelihood is None) != (self.num_tokens is None) or self.num_tokens == 0:
            raise RefusedError(
                f"{self.row}: found log_likelihood {self.log_likelihood} over {self.num_tokens} tokens; wanted "
                "both, over at least one token, or neither"
            )
        if not all(math.isfinite(score) for score in (*(self.scores or ()), self.log_likelihood or 0.0)):
            raise RefusedError(f"{self.row}: a score is not finite: {self.scores}, {self.log_likelihood}")

    @property
    def row(self) -> str:
        """The row as errors name it."""
        return f"{self.where} (id {self.id!r})"

    @property
    def predicted(self) -> str:
        """The prediction without outer white space."""
        return self.prediction.strip()

    @property
    def truth(self) -> str:
        """The first reference without outer white space."""
        return self.references[0].strip()

"""Answers while they are written: tokens of several conversations -> their texts, ended at stop strings."""

from collections.abc import Sequence

from torch import Tensor

from mmpeft.data.template import Template
from mmpeft.inference.decoding import Decoder, Sampling, Step
from mmpeft.inference.requests import Completion


class Answer:
    """One answer: the tokens that have been written, and the text that they are."""

    def __init__(self, template: Template, sampling: Sampling):
        self.template, self.stops = template, sampling.stop
        self.ids: list[int] = []
        self.log_probability = 0.0
        """Of all tokens so far, the end token among them."""
        self._completion = Completion()

    def put(self, step: Step) -> bool:
        """Adds one token; whether the answer goes on."""
        if step.token >= 0:
            self.ids.append(step.token)
        if step.finish_reason is not None:
            self._completion.finish_reason = step.finish_reason
            return False
        return not self._stopped()

    def text(self) -> str:
        """What has been written, up to a stop string."""
        text = self.template.decode(self.ids)
        ends = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        return text[: min(ends)] if ends else text

    def settled(self, text: str) -> int:
        """How much of the text will stay: its end may be half a character, or the beginning of a stop string."""
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return 0
        begun = (
            length
            for stop in self.stops
            for length in range(len(stop) - 1, 0, -1)
            if text.endswith(stop[:length])
        )
        return len(text) - max(begun, default=0)

    def completion(self) -> Completion:
        """The whole answer."""
        self._completion.text = self.text()
        return self._completion

    def _stopped(self) -> bool:
        return bool(self.stops) and any(stop in self.template.decode(self.ids) for stop in self.stops)


class Writer:
    """Collects the tokens of conversations that are being written, and ends them at stop strings.

    Args:
        template: decodes the tokens.
        samplings: of every conversation.
        handles: of the same, in a decoder.
        likely: whether it is also told how likely the answers are.
    """

    def __init__(
        self,
        template: Template,
        samplings: Sequence[Sampling],
        handles: Sequence[int],
        likely: bool = False,
    ):
        self._likely = likely
        self.answers = [Answer(template, sampling) for sampling in samplings]
        self._by_handle = dict(zip(handles, self.answers, strict=True))

    def take(self, decoder: Decoder) -> None:
        """One step."""
        steps = decoder.step()
        if self._likely:
            for step, own in zip(steps, log_probabilities(decoder.logits, decoder.drawn), strict=True):
                self._by_handle[step.conversation].log_probability += own
        for step in steps:
            if not self._by_handle[step.conversation].put(step):
                decoder.leave(step.conversation)


def log_probabilities(logits: Tensor, tokens: Tensor) -> list[float]:
    """Natural log-probabilities of tokens (conversations,) under logits (conversations, vocabulary)."""
    exact = logits.float()
    return (exact.gather(1, tokens[:, None])[:, 0] - exact.logsumexp(1)).tolist()

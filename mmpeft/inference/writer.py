"""Answers while they are written: tokens of several conversations -> their texts, ended at stop strings."""

from collections.abc import Sequence

from mmpeft.data.template import Template
from mmpeft.inference.decoding import Decoder, Sampling, Step
from mmpeft.inference.requests import Completion


class Writer:
    """Collects the tokens of conversations that are being written, and ends them at stop strings."""

    def __init__(self, template: Template, samplings: Sequence[Sampling], handles: Sequence[int]):
        self.template, self.samplings = template, samplings
        self.places = {handle: place for place, handle in enumerate(handles)}
        self.ids: list[list[int]] = [[] for _ in samplings]
        self.completions = [Completion() for _ in samplings]

    def take(self, decoder: Decoder) -> None:
        """One step."""
        for step in decoder.step():
            if not self.put(self.places[step.conversation], step):
                decoder.leave(step.conversation)

    def put(self, place: int, step: Step) -> bool:
        """One token of one conversation; whether it goes on."""
        if step.token >= 0:
            self.ids[place].append(step.token)
        if step.finish_reason is not None:
            self.completions[place].finish_reason = step.finish_reason
            return False
        return not self._stopped(place)

    def text(self, place: int) -> str:
        """What has been written, up to a stop string."""
        text = self.template.decode(self.ids[place])
        ends = [at for stop in self.samplings[place].stop if (at := text.find(stop)) >= 0]
        return text[: min(ends)] if ends else text

    def settled(self, place: int, text: str) -> int:
        """How much of the text will stay: its end may be half a character, or the beginning of a stop string."""
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return 0
        begun = (
            length
            for stop in self.samplings[place].stop
            for length in range(len(stop) - 1, 0, -1)
            if text.endswith(stop[:length])
        )
        return len(text) - max(begun, default=0)

    def completion(self, place: int) -> Completion:
        """The whole answer."""
        self.completions[place].text = self.text(place)
        return self.completions[place]

    def _stopped(self, place: int) -> bool:
        stops = self.samplings[place].stop
        return bool(stops) and any(stop in self.template.decode(self.ids[place]) for stop in stops)

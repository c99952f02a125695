"""What the demo's page asks, to one or several finetunes at once, and their answers while they are written."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

from mmpeft.data.choices import check_choices, read_choices
from mmpeft.data.video import NUM_FRAMES
from mmpeft.errors import RefusedError

CAPTION, QUESTION = "Caption", "Question"
LONGEST_QUESTION = 2000
"""Characters: the run's own limit counts tokens, after tokenizing."""
MOST_TOGETHER = 8
"""Finetunes that are asked side by side."""
PAUSE = 0.05
"""Seconds between two pictures of answers that are being written."""


@dataclass(frozen=True)
class Upload:
    """The file of an image or a video on this machine, and what it was called where it came from."""

    path: str
    name: str
    frames: int = NUM_FRAMES
    """That a video is read by."""


@dataclass
class Answer:
    """What one finetune answers; it grows until it is done."""

    finetune: str
    question: str = ""
    """What it read; of a caption, its run's instruction."""
    text: str = ""
    ranking: list[tuple[str, float]] = field(default_factory=list)
    """Choices and scores as `VisionLanguageModel.rank` gives them; empty where the answer was written."""
    remarks: list[str] = field(default_factory=list)
    """What the answer does not say of itself."""
    error: str | None = None
    """Why there is none."""
    heat_maps: list[str] = field(default_factory=list)
    """Of every image and every frame of a video where it lies under the answer, as a data URL."""
    heat_map_titles: list[str] = field(default_factory=list)
    """What each of them lies on: of a frame which video's, and when it is shown; of an image nothing."""
    seconds: float = 0.0
    done: bool = False


@dataclass
class Turn:
    """A question and its answers."""

    question: str
    answers: list[Answer]
    truth: str | None = None
    """Of a held-out example."""


@dataclass
class Conversation:
    """The turns about the same images and videos."""

    images: list[Upload] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)

    def history(self, finetune: str) -> list[tuple[str, str]]:
        """The earlier (question, answer) pairs of one finetune: of the turns that it answered."""
        return [
            (answer.question, answer.text)
            for turn in self.turns
            for answer in turn.answers
            if answer.finetune == finetune and answer.done and answer.error is None and answer.text.strip()
        ]


@dataclass
class Asked:
    """One question of the page."""

    images: list[Upload]
    task: str
    question: str
    """Empty for a caption, whose instruction is the run's."""
    finetunes: list[str]
    choices: list[str] | None = None
    """Those that were typed."""
    earlier: Conversation | None = None
    """What is to be read before it, if anything."""
    heat_map: bool = False
    """Whether to show what the answers rest on."""

    def history(self, finetune: str) -> list[tuple[str, str]]:
        """What this finetune reads before the question."""
        return self.earlier.history(finetune) if self.earlier else []

    def forgotten(self, finetune: str) -> list[str]:
        """That it reads less of the conversation than there was."""
        turns = len(self.earlier.turns) if self.earlier else 0
        read = len(self.history(finetune))
        return [f"reads {read} of the {turns} earlier turns: those that it answered"] if read < turns else []


def asked_by(
    images: Sequence[Upload],
    task: str,
    question: str | None,
    finetunes: Sequence[str],
    choices: str | None,
    earlier: Conversation | None,
    heat_map: bool = False,
) -> Asked:
    """What a person entered.

    Raises:
        RefusedError: it cannot be asked, whoever is to answer.
    """
    finetunes = [*dict.fromkeys(finetunes)]
    if not 1 <= len(finetunes) <= MOST_TOGETHER:
        raise RefusedError(f"choose 1 to {MOST_TOGETHER} finetunes to answer; {len(finetunes)} are chosen")
    if task == CAPTION and not images:
        raise RefusedError("a caption needs an image or a video: upload one or click an example")
    text = _checked(question, "a question") if task == QUESTION else ""
    given = None
    if (choices or "").strip():
        given = read_choices(_checked(choices, "choices"))
        check_choices(given, "the choices")
    return Asked(list(images), task, text, finetunes, given, earlier, heat_map)


Change = Callable[[Answer], None]
"""What an event does to an answer."""


class Answers:
    """The answers to one question, which others change from their threads."""

    def __init__(self, finetunes: Sequence[str]):
        self.now = [Answer(name) for name in finetunes]
        """As they are; changed by `stream` alone, and by whoever waited for its end."""
        self._events: SimpleQueue[tuple[int, Change]] = SimpleQueue()
        self._start = time.perf_counter()

    def tell(self, number: int, change: Change) -> None:
        """Has the answer of the finetune of this number changed."""
        self._events.put((number, change))

    def refuse(self, number: int, error: RefusedError) -> None:
        """There will be none."""
        self.tell(number, lambda answer: _refused(answer, error))

    def stream(self) -> Iterator[list[Answer]]:
        """All answers as they are now, again and again until the last is done."""
        while not all(answer.done for answer in self.now):
            number, change = self._events.get()
            self._apply(number, change)
            end = time.perf_counter() + PAUSE
            while (left := end - time.perf_counter()) > 0 and not all(own.done for own in self.now):
                try:
                    self._apply(*self._events.get(timeout=left))
                except Empty:
                    break
            yield self.now

    def _apply(self, number: int, change: Change) -> None:
        answer = self.now[number]
        change(answer)
        answer.seconds = time.perf_counter() - self._start


def _refused(answer: Answer, error: RefusedError) -> None:
    answer.error, answer.done = str(error), True


def _checked(text: str | None, what: str) -> str:
    if not 0 < len((text or "").strip()) <= LONGEST_QUESTION:
        raise RefusedError(f"type {what} of 1 to {LONGEST_QUESTION} characters")
    return str(text)

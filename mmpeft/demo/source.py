"""Whom the demo's page asks: loaded runs or a server, by one set of methods."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL import Image

from mmpeft.demo.asked import CAPTION, Answer, Asked, Upload


@dataclass(frozen=True)
class Picture:
    """An image that the page shows, and what it is called there."""

    image: Image.Image
    name: str


@dataclass
class Example:
    """A held-out example of a run."""

    images: list[Picture]
    """By the names of their files."""
    task: str
    question: str
    truth: str | None


@dataclass
class About:
    """What there is to know of a run."""

    name: str
    facts: dict[str, str]
    card: str
    """Markdown; empty where there is none."""
    pictures: list[tuple[str, Image.Image]]
    """(name, picture), the report with its curves first."""


def truth_of(examples: Sequence[Example], asked: Asked) -> str | None:
    """Of what is asked, where it is one of the examples."""
    names = [own.name for own in asked.images]
    return next(
        (
            own.truth
            for own in examples
            if [each.name for each in own.images] == names
            and own.task == asked.task
            and (own.task == CAPTION or own.question == asked.question)
        ),
        None,
    )


class Source(Protocol):
    """Answers the page's questions."""

    name: str
    told: str
    """The title's second line."""
    finetunes: list[str]
    """Who can be asked; the first is asked where nobody chooses."""
    videos: bool
    """Whether it can be asked about videos."""
    captions: bool
    """Whether it can be asked for a caption."""
    explains: bool
    """Whether it can show what an answer rests on."""
    examples: list[Example]
    about: list[About]

    def check(self, upload: Upload) -> None:
        """Raises:
        RefusedError: the file cannot be asked about; it names the file.
        """
        ...

    def ask(self, asked: Asked) -> Iterator[list[Answer]]:
        """All answers as they are now, again and again until the last is done. What one of them cannot do is its own
        ``error``.

        Raises:
            RefusedError: it cannot be asked, whoever is to answer.
        """
        ...

    def code(self, asked: Asked, answers: Sequence[Answer]) -> tuple[str, str]:
        """What asks the same from Python, and with curl from a server."""
        ...

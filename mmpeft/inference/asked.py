"""What a caller asks, one item or many, as records and choices that are aligned, or refused with its place."""

from collections.abc import Sequence
from typing import Any

from mmpeft.data.choices import check_choices
from mmpeft.data.images import ImageLike
from mmpeft.data.records import IMAGE_MARKER, Record
from mmpeft.errors import RefusedError

Images = ImageLike | tuple[ImageLike, ...] | None
"""What one question is about: an image, several, or none."""
History = Sequence[tuple[str, str]]
"""The earlier (question, answer) pairs of a conversation, the first first."""


def record_of(images: Images, question: str, where: str, task: str | None, history: History = ()) -> Record:
    """Of one question and the conversation before it; ``<image>`` says where in the questions the images stand, else
    they come first."""
    listed: list[Any] = [] if images is None else list(images) if isinstance(images, tuple) else [images]
    if not isinstance(question, str):
        raise RefusedError(f"{where} is {question!r:.80}; wanted text")
    _check_history(history)
    turns: list[tuple[str, str | None]] = [*history, (question, None)]
    markers = sum(asked.count(IMAGE_MARKER) for asked, _ in turns)
    if markers and markers != len(listed):
        raise RefusedError(f"{where} has {markers} {IMAGE_MARKER} but {len(listed)} images were given")
    if not markers and question.strip():  # an empty one stays so, for the engine to refuse
        turns[0] = (IMAGE_MARKER * len(listed) + turns[0][0], turns[0][1])
    return Record(id="", images=listed, turns=turns, task=task, where=where)


def _check_history(history: History) -> None:
    for number, turn in enumerate(history, 1):
        texts = isinstance(turn, tuple | list) and len(turn) == 2 and all(isinstance(t, str) for t in turn)
        if not texts or not all(text.strip() for text in turn) or IMAGE_MARKER in turn[1]:
            raise RefusedError(
                f"turn {number} of the history is {turn!r:.80}; wanted a question and its answer, both with text, and "
                f"no {IMAGE_MARKER} in the answer"
            )


def choices_of(choices: Sequence[Any], places: Sequence[str]) -> list[list[str]]:
    """A list of choices for every question."""
    one = not isinstance(choices, str) and all(isinstance(choice, str) for choice in choices)
    given = [choices] * len(places) if one or isinstance(choices, str) else choices
    if len(given) != len(places):
        raise RefusedError(f"{len(given)} lists of choices for {len(places)} questions; give one for each")
    for own, where in zip(given, places, strict=True):
        check_choices(own, where)
    return [list(own) for own in given]


def aligned(image: Any, question: Any, adapter: Any) -> tuple[list[Any], list[Any], list[Any], bool]:
    """Lists of equal length, single values repeated; and whether nothing was a list."""
    values = {"image": image, "question": question, "adapter": adapter}
    lengths = {name: len(value) for name, value in values.items() if isinstance(value, list)}
    if len(set(lengths.values())) > 1:
        raise RefusedError(
            "lists of different length: " + ", ".join(f"{n} {name}s" for name, n in lengths.items())
        )
    length = next(iter(lengths.values()), 1)
    images, questions, adapters = (
        value if isinstance(value, list) else [value] * length for value in values.values()
    )
    return images, questions, adapters, not lengths

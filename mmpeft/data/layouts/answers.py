"""Answers: a text, a number, a choice by its place or letter, or what several people said."""

import re
from collections import Counter
from typing import Any

from mmpeft.data.formats import DataError
from mmpeft.data.layouts.choices import Choices
from mmpeft.data.layouts.notes import Notes
from mmpeft.data.layouts.values import as_list, as_spoken, from_json, from_python, is_absent, short
from mmpeft.metrics.vqa import normalise

LIST_OF_PYTHON = re.compile(r"\['.*'\]", re.S)
TEXTS = ("answer", "raw", "caption", "text")
"""Under what an object of a list holds its text: VQA v2, Karpathy's sentences, COCO."""


def read_answer(value: Any, name: str, choices: Choices | None) -> str:
    """Raises:
    DataError: it is no answer, or names a choice that there is not.
    """
    if isinstance(value, str) and LIST_OF_PYTHON.fullmatch(value):
        raise DataError(
            f"{name} is {short(value)}, a list as Python prints it; write it as a list, or as the answer alone"
        )
    return as_spoken(value, name) if choices is None else choices.resolve(value, name)


def read_people(value: Any, name: str, notes: Notes, required: bool) -> list[str]:
    """What several people said, without empty texts, which are counted.

    Raises:
        DataError: nobody said anything and an answer is ``required``.
    """
    value = from_python(from_json(value))
    if isinstance(value, dict):  # a column a field: SQuAD's {text: [...], answer_start: [...]}
        value = next((value[key] for key in TEXTS if key in value), value)
    if not required and isinstance(value, list) and not value:
        return []
    texts = [_text_of(item, name) for item in as_list(value, name)]
    said = [text for text in texts if text.strip()]
    if not said and required:
        raise DataError(f"{name} holds no text: {short(texts)}; write the answer, or drop the row")
    notes.empty_answers += len(texts) - len(said) if said else 0
    return said


def one_of(value: Any, name: str) -> Any:
    """The answer that is alone in a list; other values are themselves.

    Raises:
        DataError: there are several, which may be several people's answers or the parts of one.
    """
    if not isinstance(value, list):
        return value
    if len(value) != 1:
        raise DataError(
            f"{name} is {short(value)}, {len(value)} answers; if they are several people's, say so (data.columns: "
            f"{{answers: {name}}}), else write them as one text"
        )
    return value[0]


def refuse_several_right(value: Any, choices: Choices) -> None:
    """Raises:
    DataError: each of several answers is another choice: of such a question several are right.
    """
    texts = [text.strip() for text in value if isinstance(text, str)] if isinstance(value, list) else []
    among = {choice.strip() for choice in choices.texts} | {*choices.labels}
    if len(texts) > 1 and len({*texts}) == len(texts) and among.issuperset(texts):
        raise DataError(
            f"answers are {texts}, several of the choices; only one choice can be right: drop the row"
        )


def most_frequent(texts: list[str]) -> str:
    """Of equally frequent ones the first; outer whitespace does not matter."""
    trimmed = [text.strip() for text in texts]
    return texts[trimmed.index(Counter(trimmed).most_common(1)[0][0])]


def starting_with(answer: str, references: list[str]) -> list[str]:
    """The references, those first that say what the answer does; it is added only where none does. Published answers
    are often normalised where what people said is not, and one person more would change how many agree."""
    for plain in (str.strip, normalise):
        for number, text in enumerate(references):
            if plain(text) == plain(answer) != "":
                others = references[:number] + references[number + 1 :]
                return [answer if plain is str.strip else text, *others]
    return [answer, *references]


def _text_of(item: Any, name: str) -> str:
    if isinstance(item, dict):
        item = next((item[key] for key in TEXTS if not is_absent(item.get(key))), None)
    return "" if is_absent(item) else as_spoken(item, name)

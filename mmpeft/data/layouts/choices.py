"""The choices of a question, and which of them an index or a letter names."""

import re
from dataclasses import dataclass
from typing import Any

from mmpeft.data.formats import DataError
from mmpeft.data.layouts.fields import Fields
from mmpeft.data.layouts.values import as_list, as_spoken, from_json, from_python, short

LETTERS = "ABCDEFGHIJ"
LETTER_AND_TEXT = re.compile(r"\(?([A-J])[).:]\s*(.+)", re.S)
"""An answer that names its choice in both ways."""


@dataclass
class Choices:
    """What a row lists, and how it names them."""

    texts: list[str]
    labels: list[str]
    """A letter or the like for each."""
    labelled: bool = True
    """Whether the row gives the labels itself; else they are the letters of the places, and a text goes first."""

    def resolve(self, answer: Any, name: str) -> str:
        """The choice that an answer names: by its text, its label, or as a number its place, the first being 0.

        Raises:
            DataError: it names none, or one by its text and another by its place or label.
        """
        trimmed = [text.strip() for text in self.texts]
        if isinstance(answer, int) and not isinstance(answer, bool):
            is_place = 0 <= answer < len(self.texts)
            if str(answer) in trimmed and trimmed.index(str(answer)) != answer:
                if not is_place:
                    return self.texts[trimmed.index(str(answer))]
                raise DataError(
                    f"{name} is {answer}, which is one of the choices {self.texts} and the place of another; "
                    "write the choice as text"
                )
            if not is_place:
                raise DataError(
                    f"{name} is {answer}, but the choices are counted from 0 to {len(self.texts) - 1}: {self.texts}"
                )
            return self.texts[answer]
        said = as_spoken(answer, name)
        if said.strip().isdigit() and said.strip() not in (*trimmed, *self.labels):
            return self.resolve(int(said), name)
        if both := LETTER_AND_TEXT.fullmatch(said.strip()):
            place = self.labels.index(both[1]) if both[1] in self.labels else None
            if place is not None and trimmed[place] == both[2]:
                return self.texts[place]
        letter = said.strip().strip("().:")
        if letter not in self.labels or (not self.labelled and said.strip() in trimmed):
            return said
        meant = self.texts[self.labels.index(letter)]
        if said.strip() in trimmed and said.strip() != meant.strip():
            raise DataError(
                f"{name} is {said!r}, which is one of the choices {self.texts} and the letter of another; write the "
                "choice as text"
            )
        return meant


def take_choices(fields: Fields) -> Choices | None:
    """The choices of a row, be they a list, an object of letters, ARC's two lists or a column each."""
    if lettered := [key for key in fields.keys.lettered if key in fields.left]:
        texts = [
            as_spoken(value, key) for key, value in zip(lettered, fields.take_all(lettered), strict=True)
        ]
        return Choices(*_without_letters(texts, list(LETTERS[: len(texts)])))
    if gapped := [key for key in fields.keys.gapped if key in fields.left]:
        raise DataError(
            f"found {gapped}; wanted choices A, B, C, ... each once and none missing or empty between them: write "
            "it, or drop the row"
        )
    key = fields.key("choices")
    if key is None:
        return None
    given = fields.take("choices")
    value = from_python(from_json(given))
    if isinstance(given, str) and value == []:  # MMMU's open questions
        return None
    if isinstance(value, dict) and {*value} == {"text", "label"}:
        texts, labels = as_list(value["text"], "choices"), as_list(value["label"], "choices")
        return Choices(_texts(texts), [str(label) for label in labels])
    if isinstance(value, dict):
        return Choices(_texts(list(value.values())), [str(label).strip() for label in value])
    texts = _texts(as_list(value, "choices"))
    return Choices(texts, list(LETTERS[: len(texts)]), labelled=False)


def take_right_choice(fields: Fields, choices: Choices | None, answer: str | None) -> str | None:
    """The answer, also where a row names the right choice by a key of its own.

    Raises:
        DataError: that names another choice than the answer, or there are no choices.
    """
    if not fields.has("right choice"):
        return answer
    key = fields.key("right choice")
    value = fields.take("right choice")
    if choices is None:
        raise DataError(f"{key} is {short(value)}, but the row has no choices; add them, or take the key out")
    if isinstance(value, str) and value.strip().isdigit():
        value = int(value)
    if isinstance(value, str) and value.strip().strip("().:") not in choices.labels:
        raise DataError(f"{key} is {value!r}; wanted one of {choices.labels}")
    right = choices.resolve(value, str(key))
    if answer is not None and answer.strip() != right.strip():
        raise DataError(
            f"{key} names the choice {right!r}, but the answer is {answer!r}; correct one of them"
        )
    return right


def _texts(values: list) -> list[str]:
    return [as_spoken(value, "choices") for value in values]


def _without_letters(texts: list[str], letters: list[str]) -> tuple[list[str], list[str]]:
    """Texts that all begin with their own letter ("A: a lung") without it."""
    found = [re.match(rf"\s*{letter}\s*[:.)]\s*", text) for text, letter in zip(texts, letters, strict=True)]
    if all(found):
        return [text[own.end() :].strip() for text, own in zip(texts, found, strict=True) if own], letters
    return texts, letters

"""Resuming an evaluation: answers on disk as they come, so that a killed one goes on where it stopped."""

import json
from collections.abc import Iterable
from pathlib import Path

from mmpeft.files import append, write_whole
from mmpeft.inference.requests import Completion


class AnswerLog:
    """A JSONL file: what the answers belong to, then an answer a line.

    Args:
        path: of the file; one that belongs to something else is begun anew. None keeps the answers in memory.
        belongs_to: identity of the model and the questions.
    """

    def __init__(self, path: Path | None, belongs_to: str):
        self.path = path
        self.answers: dict[int, Completion] = {}
        """Number of the example -> its answer."""
        if path is None:
            return
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        same = bool(lines) and lines[0] == json.dumps({"belongs_to": belongs_to})
        if same:
            # the last line may be half an answer, and an evaluation of nothing would never end
            self.answers = dict(answer for line in lines[1:-1] if (answer := _read(line)) is not None)
        write_whole(path, json.dumps({"belongs_to": belongs_to}) + "\n" + _lines(self.answers.items()))

    def append(self, answers: Iterable[tuple[int, Completion]]) -> None:
        """Adds answers, and has them on disk before it returns."""
        answers = list(answers)
        self.answers.update(answers)
        if self.path is not None:
            append(self.path, _lines(answers).encode())

    def discard(self) -> None:
        """Removes the file: all is answered and written where it belongs."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _read(line: str) -> tuple[int, Completion] | None:
    """An answer and its number; None of a damaged line, whose question is asked again."""
    try:
        row = json.loads(line)
        return row.pop("number"), Completion(**row)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _lines(answers: Iterable[tuple[int, Completion]]) -> str:
    return "".join(json.dumps({"number": number, **answer.stored()}) + "\n" for number, answer in answers)

"""Resuming an evaluation: answers on disk as they come, so that a killed one goes on where it stopped."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

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
        lines = path.read_text().splitlines() if path.exists() else []
        same = bool(lines) and lines[0] == json.dumps({"belongs_to": belongs_to})
        if same:
            # the last line may be half an answer, and an evaluation of nothing would never end
            for line in lines[1:-1]:
                row = json.loads(line)
                number = row.pop("number")
                self.answers[number] = Completion(**row)
        path.parent.mkdir(parents=True, exist_ok=True)
        begun = path.with_suffix(".part")
        begun.write_text(json.dumps({"belongs_to": belongs_to}) + "\n" + _lines(self.answers.items()))
        os.replace(begun, path)

    def append(self, answers: Iterable[tuple[int, Completion]]) -> None:
        """Adds answers, and has them on disk before it returns."""
        answers = list(answers)
        self.answers.update(answers)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(_lines(answers))

    def discard(self) -> None:
        """Removes the file: all is answered and written where it belongs."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _lines(answers: Iterable[tuple[int, Completion]]) -> str:
    return "".join(json.dumps({"number": number, **answer.stored()}) + "\n" for number, answer in answers)

"""Resuming an evaluation: answers on disk as they come, so that a killed one goes on where it stopped.

::

    test.partial.jsonl      of the first process, with all that were there when it began
    test.partial.1.jsonl    of the next one
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from mmpeft.data.shares import Share
from mmpeft.files import append, write_whole
from mmpeft.inference.requests import Completion


class AnswerLog:
    """A JSONL file: what the answers belong to, then an answer a line.

    Args:
        path: of the first process's file; one that belongs to something else is begun anew. None keeps the answers in
            memory.
        belongs_to: identity of the model and the questions.
        share: whose answers are added.
        wait: until all processes are here.
    """

    def __init__(
        self,
        path: Path | None,
        belongs_to: str,
        share: Share = Share(),  # noqa: B008 never written to
        wait: Callable[[], object] = lambda: None,
    ):
        self._first, self._share, self._wait = path, share, wait
        self._head = json.dumps({"belongs_to": belongs_to})
        self.answers: dict[int, Completion] = {}
        """Number of the example -> its answer."""
        self.path = None if path is None else self._of(share.rank)
        if path is None or self.path is None:
            return
        found = sorted(path.parent.glob(f"{path.stem}*{path.suffix}"))
        for each in found:
            # the last line may be half an answer, and an evaluation of nothing would never end
            self.answers |= self._read(each, slice(1, -1))
        wait()  # until all have read them
        if share.rank == 0:
            write_whole(path, f"{self._head}\n{_lines(self.answers.items())}")
            for each in found:
                if each != path:
                    each.unlink()
        wait()
        if share.rank > 0:
            write_whole(self.path, f"{self._head}\n")

    def append(self, answers: Iterable[tuple[int, Completion]]) -> None:
        """Adds answers, and has them on disk before it returns."""
        answers = list(answers)
        self.answers.update(answers)
        if self.path is not None:
            append(self.path, _lines(answers).encode())

    def join(self) -> None:
        """Waits for all processes; the first one then has the answers of all."""
        self._wait()
        if self._first is not None and self._share.rank == 0:
            for rank in range(1, self._share.size):
                self.answers |= self._read(self._of(rank), slice(1, None))

    def discard(self) -> None:
        """Removes the files: all is answered and written where it belongs."""
        if self._first is not None:
            for rank in range(self._share.size):
                self._of(rank).unlink(missing_ok=True)

    def _of(self, rank: int) -> Path:
        """The file of a process."""
        assert self._first is not None, "there are files"
        return self._first.with_suffix(f".{rank}{self._first.suffix}") if rank else self._first

    def _read(self, path: Path, which: slice) -> dict[int, Completion]:
        """The answers in lines of a file; none of one that belongs to something else. A damaged line is no answer."""
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        if not lines or lines[0] != self._head:
            return {}
        return dict(answer for line in lines[which] if (answer := _read(line)) is not None)


def _read(line: str) -> tuple[int, Completion] | None:
    """An answer and its number; None of a damaged line, whose question is asked again."""
    try:
        row = json.loads(line)
        return row.pop("number"), Completion(**row)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _lines(answers: Iterable[tuple[int, Completion]]) -> str:
    return "".join(json.dumps({"number": number, **answer.stored()}) + "\n" for number, answer in answers)

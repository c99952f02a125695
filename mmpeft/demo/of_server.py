"""A server of OpenAI's API, asked for all finetunes at once: `mmpeft serve` answers them in one batch."""

import re
from collections.abc import Iterator, Sequence
from threading import Event, Thread

from mmpeft.demo.asked import QUESTION, Answer, Answers, Asked, Change, Upload
from mmpeft.demo.snippets import Question, curl_of, python_of_server, ranked
from mmpeft.demo.source import About, Example
from mmpeft.demo.uploads import shows_video
from mmpeft.errors import RefusedError
from mmpeft.serving.client import Server

PLACE = re.compile(r"messages\[0\]\.content\[(\d+)\](?:\.image_url\.url)?")
"""What `mmpeft serve` calls an image."""


class OfServer:
    """A `Source` of a server.

    Raises:
        RefusedError: it cannot be asked which models it has, or has none.
    """

    videos, captions, explains = False, False, False

    def __init__(self, server: Server):
        self.server, self.name, self.told = server, server.url, "a server"
        self.finetunes = server.models()
        self.examples: list[Example] = []
        self.about: list[About] = []

    def check(self, upload: Upload) -> None:
        """Which images it reads the server knows."""
        if shows_video(upload):
            raise RefusedError(
                f"{upload.name} is a video, and a server is sent images alone; a page of the run itself, mmpeft demo "
                "--run, is asked about videos"
            )

    def ask(self, asked: Asked) -> Iterator[list[Answer]]:
        if asked.task != QUESTION:
            raise RefusedError("a server is asked questions; for a caption, ask for a description")
        for upload in asked.images:
            self.check(upload)
        answers, gone = Answers(asked.finetunes), Event()
        for number in range(len(asked.finetunes)):
            Thread(target=self._answer, args=(asked, number, answers, gone), daemon=True).start()
        try:
            yield from answers.stream()
        finally:
            gone.set()

    def code(self, asked: Asked, answers: Sequence[Answer]) -> tuple[str, str]:
        images = [image.name for image in asked.images]
        questions = [
            Question(images, asked.question, a.finetune, ranked(asked, a), asked.history(a.finetune))
            for a in answers
        ]
        has_key = self.server.api_key is not None
        return (
            python_of_server(self.server.url, questions),
            "\n".join(curl_of(own, self.server.url, has_key) for own in questions),
        )

    def _answer(self, asked: Asked, number: int, answers: Answers, gone: Event) -> None:
        name = asked.finetunes[number]
        files, history = [image.path for image in asked.images], asked.history(name)
        try:
            if asked.choices is not None:
                ranking = self.server.rank(asked.question, files, name, asked.choices, history)
                answers.tell(number, lambda answer: _ranked(answer, ranking))
            else:
                for piece in self.server.write(asked.question, files, name, history=history):
                    answers.tell(number, lambda answer, piece=piece: _add(answer, piece))
                    if gone.is_set():
                        return
            answers.tell(number, _end(asked.question, asked.forgotten(name)))
        except RefusedError as error:
            answers.refuse(number, RefusedError(_with_names(str(error), asked.images)))
        except Exception as error:  # a fault of ours: nobody may wait for it for ever
            answers.refuse(number, RefusedError(f"{type(error).__name__}: {error}"))
            raise


def _with_names(message: str, images: Sequence[Upload]) -> str:
    """With the images as the person knows them."""

    def name(found: re.Match[str]) -> str:
        number = int(found[1])
        return images[number].name if number < len(images) else found[0]

    return PLACE.sub(name, message)


def _ranked(answer: Answer, ranking: list[tuple[str, float]]) -> None:
    answer.text, answer.ranking = ranking[0][0], ranking


def _add(answer: Answer, piece: str) -> None:
    answer.text += piece


def _end(question: str, remarks: list[str]) -> Change:
    def change(answer: Answer) -> None:
        answer.question = question
        nothing = (
            [] if answer.text.strip() else [f"{answer.finetune} ended its answer at once: it wrote nothing"]
        )
        answer.remarks, answer.done = [*remarks, *nothing], True

    return change

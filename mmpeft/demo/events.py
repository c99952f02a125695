"""What happens on the demo's page: questions, uploads, clicks on examples."""

import html
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import gradio as gr

from mmpeft.demo.asked import CAPTION, QUESTION, Conversation, Turn, Upload, asked_by
from mmpeft.demo.board import board, stored
from mmpeft.demo.parts import Parts
from mmpeft.demo.source import Source, truth_of
from mmpeft.demo.uploads import shows_video
from mmpeft.errors import RefusedError


def connect(source: Source, parts: Parts) -> None:
    """Makes the page do something."""
    private: dict[str, Any] = {"api_visibility": "private"}
    quiet = private | {"queue": False, "show_progress": "hidden"}
    asked = [
        parts.images,
        parts.task,
        parts.question,
        parts.finetunes,
        parts.choices,
        parts.remember,
        parts.heat_map,
        parts.frames,
    ]
    shown = [parts.answers, parts.board, parts.python, parts.curl]
    asking = {
        "fn": _answering(source),
        "inputs": [*asked, parts.conversation],
        "outputs": [*shown, parts.conversation],
        "show_progress": "minimal",
        "show_progress_on": parts.board,
    }
    typed = [parts.ask.click, parts.question.submit, parts.choices.submit]
    gr.on(typed, **asking, api_name="answer")
    parts.images.upload(_checking(source), parts.images, parts.images, **private)
    parts.images.change(_framing(source), parts.images, parts.frames, **quiet)
    parts.clear.click(lambda: (None, "", "", "", Conversation()), None, asking["outputs"], **quiet)
    parts.task.change(lambda task: gr.update(visible=task == QUESTION), parts.task, parts.question, **quiet)
    if parts.examples is not None:
        filled = [parts.images, parts.task, parts.question, parts.choices]
        clicked = parts.examples.select(_choosing(source), None, filled, **private)
        clicked.then(**asking, **private)


def _answering(source: Source) -> Callable[..., Iterator[tuple[Any, ...]]]:
    def answer(
        images: list[Upload],
        task: str,
        question: str | None,
        finetunes: list[str],
        choices: str | None,
        remember: bool,
        heat_map: bool,
        frames: int,
        conversation: Conversation,
    ) -> Iterator[tuple[Any, ...]]:
        """Asks finetunes a question about images and videos (so many frames of each), or for a caption, in one batch;
        with choices (comma-separated), each picks the best of them. Returns their answers so far with scores, time,
        remarks or an error; the same as HTML; and Python code and a curl command that ask the same."""
        images = [replace(image, frames=int(frames)) for image in images]
        if conversation.images != images:
            conversation = Conversation(images)
        try:
            earlier = conversation if remember else None
            asked = asked_by(
                images, task, question, finetunes, choices, earlier, heat_map and source.explains
            )
            truth = truth_of(source.examples, asked)
            answers = []
            for answers in source.ask(asked):
                turns = [*conversation.turns, Turn(asked.question or CAPTION, answers, truth)]
                told = [stored(each) for each in answers]
                yield told, board(turns), gr.skip(), gr.skip(), gr.skip()
            code = source.code(asked, answers)
            turns = [*conversation.turns, Turn(asked.question or CAPTION, answers, truth)]
            yield [stored(each) for each in answers], board(turns), *code, Conversation(images, turns)
        except RefusedError as error:
            raise gr.Error(_safe(error), print_exception=False) from None

    return answer


def _checking(source: Source) -> Callable[[list[Upload]], list[Upload]]:
    def check(images: list[Upload]) -> list[Upload]:
        """Files that cannot be asked about are named and left out at once."""
        kept: list[Upload] = []
        for image in images:
            try:
                source.check(image)
                kept.append(image)
            except RefusedError as error:
                gr.Warning(f"left out: {_safe(error)}", duration=None)
        return kept

    return check


def _framing(source: Source) -> Callable[[list[Upload]], Any]:
    def framing(images: list[Upload]) -> Any:
        """How many frames are read is asked once there is a video."""
        return gr.update(visible=source.videos and any(map(_is_video, images)))

    return framing


def _is_video(upload: Upload) -> bool:
    try:
        return shows_video(upload)
    except RefusedError:
        return False


def _choosing(source: Source) -> Callable[[gr.SelectData], tuple[Any, ...]]:
    def choose(event: gr.SelectData) -> tuple[Any, ...]:
        own = source.examples[event.index]
        return own.images, own.task, own.question if own.task == QUESTION else "", ""

    return choose


def _safe(error: RefusedError) -> str:
    """For gradio's notices, which read HTML."""
    return html.escape(str(error), quote=False)

"""Runs that are loaded here, all of one base, answering in one batch, which whoever else asks joins."""

import base64
import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from mmpeft.data.records import CAPTION_TASK
from mmpeft.data.video import Video
from mmpeft.demo.about import about_run, read_examples
from mmpeft.demo.asked import CAPTION, MOST_TOGETHER, QUESTION, Answer, Answers, Asked, Change, Upload
from mmpeft.demo.snippets import Question, curl_of, python_of_run, ranked
from mmpeft.demo.together import checked_manifest, refuse_same_names, renamed, shown_name
from mmpeft.demo.uploads import Shown, shows_video
from mmpeft.errors import RefusedError
from mmpeft.inference.explain import heat_maps
from mmpeft.inference.explanation import GRADIENT
from mmpeft.inference.live import LiveEngine
from mmpeft.inference.live_settings import LiveSettings
from mmpeft.inference.reply import remarks
from mmpeft.inference.requests import Completion, Request
from mmpeft.inference.tickets import Event, Ticket
from mmpeft.inference.vlm import VisionLanguageModel, load
from mmpeft.names import RESERVED_NAME
from mmpeft.options import command_line
from mmpeft.runs.files import check_files, read_projector
from mmpeft.runs.layout import PROJECTOR
from mmpeft.runs.manifest import Manifest, read_manifest
from mmpeft.serving.finetunes import named_folders

WAITING = 64
"""Finetunes that are asked and wait for a row."""
MAP_SIDE = 480
"""Pixels of a heat map's longer side."""
MOST_VIRTUAL = 512
"""Virtual tokens of a finetune that there is room for."""


@dataclass
class Finetune:
    """One that can be asked."""

    run: Path
    own: str
    """Its name in its run."""
    live: str
    """Its name in the engine."""
    vlm: VisionLanguageModel
    """Of its run: the one model, and what the run knows of questions."""

    @property
    def question_task(self) -> str | None:
        """The identifier of its questions, which are no captions."""
        known = self.vlm.manifest.instructions
        return next((task for task in known if task and task != CAPTION_TASK), self.vlm.manifest.default_task)


class OfRuns(AbstractContextManager["OfRuns"]):
    """A `Source` of runs; its engine runs inside of ``with``.

    Args:
        runs: directories that `mmpeft fit` wrote; the first one's base answers as "base".
        device: as in `load`.

    Raises:
        RefusedError: no runs, or not of one base and read in one way.
    """

    videos, captions = True, True

    def __init__(self, runs: Sequence[str | Path], device: str = "auto"):
        first, *others = map(Path, runs)
        manifest = read_manifest(first)
        self._others = [(run, checked_manifest(run, manifest)) for run in others]
        if others:
            refuse_same_names([(first, manifest), *self._others])
        self.vlm = load(str(first), device)
        self.live = LiveEngine(self.vlm.engine, _settings(self.vlm))
        self._known = {RESERVED_NAME: Finetune(first, RESERVED_NAME, RESERVED_NAME, self.vlm)}
        for own in self.vlm.adapters:
            name = shown_name(first, own, self.vlm.adapters) if others else own
            self._known[name] = Finetune(first, own, own, self.vlm)
        self.explains = self.vlm.manifest.vision is not None
        self.finetunes = [*[*self._known][1:], RESERVED_NAME]
        paths = [first, *others]
        self.name = " · ".join(run.resolve().name for run in paths)
        encoder = self.vlm.manifest.vision["name"] if self.vlm.manifest.vision else "no images"
        self.told = f"{self.vlm.manifest.language['name']} · {encoder} · on {self.vlm.model.device}"
        self.about = [about_run(run) for run in paths]
        self.examples = read_examples(paths)

    def __enter__(self) -> "OfRuns":
        self.live.start()
        try:
            for run, manifest in self._others:
                self._add(run, manifest)
        except BaseException:
            self.live.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.live.close()

    def check(self, upload: Upload) -> None:
        self._shown([upload])

    def ask(self, asked: Asked) -> Iterator[list[Answer]]:
        shown = self._shown(asked.images)
        answers, tickets = Answers(asked.finetunes), dict[int, Ticket]()
        try:
            for number, name in enumerate(asked.finetunes):
                try:
                    tickets[number] = self._submit(asked, name, shown, partial(answers.tell, number))
                except RefusedError as error:
                    answers.refuse(number, error)
            yield from answers.stream()
            for number, ticket in tickets.items() if asked.heat_map else ():
                yield self._explained(ticket, answers, number, shown)
        finally:
            for ticket in tickets.values():
                ticket.cancel()

    def code(self, asked: Asked, answers: Sequence[Answer]) -> tuple[str, str]:
        python, curl = [], []
        for run in dict.fromkeys(self._known[name].run for name in asked.finetunes):
            questions = [
                _question(asked, self._known[answer.finetune], answer)
                for answer in answers
                if self._known[answer.finetune].run == run
            ]
            python.append(python_of_run(str(run), questions))
            curl += [f"# {command_line('serve', '--run', run)}", *map(curl_of, questions)]
        return "\n\n".join(["import mmpeft", *python]), "\n".join(curl)

    # -- asking -------------------------------------------------------------------------------------------------

    def _submit(self, asked: Asked, name: str, shown: Shown, tell: Any) -> Ticket:
        finetune, (question, task) = self._known[name], self._instruction(asked, name)
        (request,), _ = finetune.vlm.requests(
            shown.about or None,
            question,
            finetune.live,
            task,
            None,
            asked.choices,
            history=asked.history(name),
        )
        shown.put_into(request.record)

        def on_event(event: Event) -> None:
            told = (
                self._ended(finetune, name, asked, request, event) if isinstance(event, Completion) else None
            )
            tell(told or partial(_add_text, text=event.text))

        return self.live.submit(request, on_event=on_event)

    def _instruction(self, asked: Asked, name: str) -> tuple[str, str | None]:
        """(text, task) that a finetune reads."""
        finetune = self._known[name]
        if asked.task == CAPTION:
            return finetune.vlm.caption_instruction, CAPTION_TASK
        if asked.task != QUESTION:
            raise RefusedError(f"the task is {asked.task!r}; wanted {QUESTION} or {CAPTION}")
        return asked.question, finetune.question_task

    def _ended(
        self, finetune: Finetune, name: str, asked: Asked, request: Request, completion: Completion
    ) -> Change:
        given, manifest = asked.choices is not None, finetune.vlm.manifest
        who = None if name == RESERVED_NAME else name
        told = [] if completion.error else remarks(manifest, request, completion, given, who=who)
        if completion.cut:
            told.append(
                f"cut after {request.sampling.max_new_tokens} tokens, the longest that an answer may have"
            )

        def change(answer: Answer) -> None:
            answer.question, _ = self._instruction(asked, name)
            answer.text, answer.ranking = completion.text, completion.ranking(request)
            answer.error, answer.remarks = completion.error, [*told, *asked.forgotten(name)]
            answer.done = True

        return change

    def _explained(self, ticket: Ticket, answers: Answers, number: int, shown: Shown) -> list[Answer]:
        """The answers, with what one of them, which has ended, rests on."""
        answer, request, ends = answers.now[number], ticket.request, not ticket.result().cut
        try:
            if answer.text.strip():
                found = self.live.between_steps(
                    lambda: heat_maps(self.vlm.engine, request, answer.text, [GRADIENT], ends)
                )
                images: list[Any] = request.record["images"]
                pictures = [found.overlay(number=place, side=MAP_SIDE) for place in range(len(images))]
                answer.heat_maps = list(map(_data_url, pictures))
                answer.heat_map_titles = list(map(shown.title, images))
        except RefusedError as error:
            answer.remarks.append(f"no heat map: {error}")
        return answers.now

    def _shown(self, uploads: Sequence[Upload]) -> Shown:
        return Shown(uploads, self.vlm.manifest.image_config)

    # -- loading ------------------------------------------------------------------------------------------------

    def _add(self, run: Path, manifest: Manifest) -> None:
        """Loads the finetunes of one more run into the engine."""
        names = dict[str, str]()
        for own, folder in named_folders([str(run)], self.vlm.manifest):
            check_files(folder, manifest.adapter_files.get(own, {}))
            if own in manifest.projectors:
                read_projector(folder / PROJECTOR, manifest.projectors[own])
            names[own] = name = shown_name(run, own, manifest.adapters)
            self.live.load(name, folder)
        view = copy.copy(self.vlm)
        view.manifest = renamed(manifest, names)
        self._known |= {name: Finetune(run, own, name, view) for own, name in names.items()}
        self.finetunes[-1:] = [*names.values(), RESERVED_NAME]


def _data_url(picture: Image.Image) -> str:
    file = BytesIO()
    picture.save(file, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _add_text(answer: Answer, text: str) -> None:
    answer.text += text


def _question(asked: Asked, finetune: Finetune, answer: Answer) -> Question:
    """How a finetune was asked, for whoever asks it in another way."""
    caption = asked.task == CAPTION
    task = CAPTION_TASK if caption else finetune.question_task
    return Question(
        images=[Video(own.name, own.frames) if shows_video(own) else own.name for own in asked.images],
        text=finetune.vlm.caption_instruction if caption else asked.question,
        model=finetune.own,
        choices=ranked(asked, answer),
        history=asked.history(answer.finetune),
        task=None if task == finetune.vlm.manifest.default_task else task,
    )


def _settings(vlm: VisionLanguageModel) -> LiveSettings:
    """Rows for the finetunes of one question, as long as the run's prompts and answers may be."""
    columns = vlm.template.max_length + vlm.manifest.max_new_tokens + MOST_VIRTUAL
    return LiveSettings(max_rows=MOST_TOGETHER, max_columns=columns, max_waiting=WAITING)

"""Code to copy: what asks the same as the demo's page did, from Python and with curl. It names files, and no keys."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mmpeft.data.video import NUM_FRAMES, Video
from mmpeft.demo.asked import Answer, Asked
from mmpeft.serving.client import in_order, media_type

SERVED = "http://127.0.0.1:8000"
"""Where `mmpeft serve` listens by default."""
KEY = "MMPEFT_API_KEY"
"""Variable of the environment that holds a server's key."""


@dataclass
class Question:
    """How one finetune was asked."""

    images: Sequence[str | Video]
    """Names of files, those of videos as such."""
    text: str
    model: str
    choices: list[str]
    """Those that were ranked; none of a written answer."""
    history: list[tuple[str, str]]
    task: str | None = None
    """Where it is not the run's own."""


def ranked(asked: Asked, answer: Answer) -> list[str]:
    """The choices that an answer is picked from, in the order that they were typed in, if they were; also where there
    is none."""
    return asked.choices or [choice for choice, _ in answer.ranking]


def python_of_run(run: str, questions: Sequence[Question]) -> str:
    """Code that loads a run and prints the answers; those who were asked the same are asked in one batch. It needs
    ``import mmpeft`` before it."""
    first = questions[0]
    alike = all(replace(own, model=first.model) == first for own in questions)
    if len(questions) > 1 and alike and not first.history:
        calls = [_ask(first, repr([own.model for own in questions]))]
    else:
        calls = [_ask(own, repr(own.model)) for own in questions]
    return "\n".join([f"vlm = mmpeft.load({run!r})", *(f"print({own})" for own in calls)])


def _ask(question: Question, adapter: str) -> str:
    files = [_file(own) for own in question.images]
    images = files[0] if len(files) == 1 else f"({', '.join(files)})" if files else "None"
    named = {
        "choices": question.choices,
        "task": question.task,
        "history": question.history,
    }
    more = [f"{name}={value!r}" for name, value in named.items() if value]
    return f"vlm.ask({', '.join([images, repr(question.text), f'adapter={adapter}', *more])})"


def _file(own: str | Video) -> str:
    if not isinstance(own, Video):
        return repr(own)
    return f"mmpeft.Video({str(own.path)!r}{'' if own.frames in (None, NUM_FRAMES) else f', frames={own.frames}'})"


def python_of_server(url: str, questions: Sequence[Question]) -> str:
    """Code that prints a server's answers; it needs mmpeft alone, and the server's key where it wants one."""
    lines = [
        "import os",
        "",
        "from mmpeft.serving.client import Server",
        "",
        f"server = Server({url!r}, os.environ.get({KEY!r}))",
    ]
    for own in questions:
        asked = f"{own.text!r}, {own.images!r}, {own.model!r}"
        history = f", history={own.history!r}" if own.history else ""
        if own.choices:
            lines.append(f"print(server.rank({asked}, {own.choices!r}{history})[0][0])")
        else:
            lines.append(f"print(''.join(server.write({asked}{history})))")
    return "\n".join(lines)


def curl_of(question: Question, url: str = SERVED, has_key: bool = False) -> str:
    """A command for a shell, which reads the images from their files."""
    if question.task is not None:
        return (
            f"# a server begins all questions with its run's own task; {question.task!r} is asked from Python"
        )
    if any(isinstance(own, Video) for own in question.images):
        return "# a server is sent images alone; about a video it is asked from Python"
    path = "/v1/score" if question.choices else "/v1/chat/completions"
    asked = {"choices": question.choices} if question.choices else {"temperature": 0}
    fields = [f'"model": {_text(question.model)}', f'"messages": [{", ".join(_messages(question))}]']
    fields += [f'"{name}": {_text(value)}' for name, value in asked.items()]
    key = f' -H "Authorization: Bearer ${KEY}"' if has_key else ""
    return (
        f"curl {shlex.quote(url + path)} -H 'Content-Type: application/json'{key} -d @- <<END\n"
        f"{{{', '.join(fields)}}}\nEND"
    )


def _messages(question: Question) -> list[str]:
    texts = [*(text for turn in question.history for text in turn), question.text]
    contents = [_text(text) for text in texts]
    if question.images:
        contents[0] = f"[{', '.join(_parts(texts[0], [*map(str, question.images)]))}]"
    roles = ["user", "assistant"] * len(texts)
    return [
        f'{{"role": "{role}", "content": {content}}}' for role, content in zip(roles, contents, strict=False)
    ]


def _parts(text: str, images: Sequence[str]) -> list[str]:
    return [
        _image(images[part]) if isinstance(part, int) else f'{{"type": "text", "text": {_text(part)}}}'
        for part in in_order(text, len(images))
    ]


def _image(name: str) -> str:
    file = f"$(base64 < {shlex.quote(name)} | tr -d '\\n')"
    return f'{{"type": "image_url", "image_url": {{"url": "data:{media_type(Path(name))};base64,{file}"}}}}'


def _text(value: object) -> str:
    """JSON inside of a here-document, where the shell looks for these three."""
    told = json.dumps(value)
    for special in "\\$`":
        told = told.replace(special, f"\\{special}")
    return told

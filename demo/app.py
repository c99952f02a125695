"""A web page to ask a run: ``python demo/app.py --run runs/quickstart``, then open the address it prints. With
``--server URL`` it asks a server instead.

Whatever people upload or type is untrusted: images go through the toolkit's decoder, and answers are shown as
text, never as HTML or Markdown. The page listens on this machine alone unless told otherwise.
"""

import html
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read once, when gradio is imported

import gradio as gr
from jsonargparse import auto_cli
from PIL import Image

import mmpeft
from mmpeft.data.choices import check_choices, read_choices
from mmpeft.data.images import load_image
from mmpeft.data.records import CAPTION_TASK
from mmpeft.errors import RefusedError
from mmpeft.inference.reply import reply
from mmpeft.metrics.intervals import readable
from mmpeft.runs.layout import RUN
from mmpeft.serving.client import Server, named_server

CAPTION, QUESTION = "Caption", "Question"
Example = tuple[Image.Image, str, str, str | None]
"""Image, task, question and truth."""
LONGEST_QUESTION = 2000  # characters: the run's own limit counts tokens, after tokenizing
CSS = """
.gradio-container {width: 100%; max-width: 1080px !important; margin: auto}
#title h1 {font-size: 1.7rem; font-weight: 700; margin: 0.4rem 0 0.2rem}
#title p {color: var(--body-text-color-subdued); margin: 0}
#image img {width: 100%; height: 100%; object-fit: contain}
#answer textarea {font-size: 1.2rem; font-weight: 600}
#examples .grid-wrap {min-height: 0; max-height: none; padding-top: 2.3rem}
#examples .thumbnail-item {height: auto; aspect-ratio: auto; display: flex; flex-direction: column}
#examples .thumbnail-item img {width: 100%; aspect-ratio: 4/3; object-fit: contain}
#examples .caption-label {position: static; max-width: 100%; white-space: normal; border: none; box-shadow: none}
#facts table {width: 100%} #facts :is(table, tr, td) {border: none}
#facts td {padding: 0.45rem 0.6rem; border-bottom: 1px solid var(--border-color-primary)}
#facts td:first-child {color: var(--body-text-color-subdued); width: 9rem}
footer .divider {display: none}
@media (max-width: 640px) {#examples .grid-container {grid-template-columns: repeat(3, 1fr)}}
"""
LAUNCH = {
    "max_file_size": "20mb",
    "theme": gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    "css": CSS,
    "footer_links": ["api"],
}
"""How `build`'s page is launched, here and in tests."""


@dataclass
class Source:
    """Whom the page asks, and what it says of them."""

    name: str
    about: str
    """HTML of the title's second line."""
    finetunes: list[str]
    answer: Callable[..., Any]
    """(image file, task, question, finetune, choices) -> (answer, time, ranking), or an iterator of them."""
    captions: bool = True
    """Whether it can be asked for a caption."""
    examples: list[Example] = field(default_factory=list)
    facts: str = ""
    report: Path | None = None


def of_run(vlm: mmpeft.VisionLanguageModel, run: Path) -> Source:
    """A run that is loaded here."""
    vision = vlm.manifest.vision["name"] if vlm.manifest.vision else "no images"
    about = html.escape(f"{vlm.manifest.language['name']} · {vision} · on {vlm.model.device}")
    name, finetunes = run.resolve().name, [*vlm.adapters, "base"]
    report = run / "report.png" if (run / "report.png").is_file() else None
    return Source(name, about, finetunes, _answerer(vlm), True, _read_examples(run), _facts(vlm), report)


def of_server(server: Server) -> Source:
    """A server of OpenAI's API; its answers are shown as they are written.

    Raises:
        RefusedError: it cannot be asked which models it has, or has none.
    """
    return Source(server.url, "a server", server.models(), _server_answerer(server), captions=False)


def build(source: Source) -> gr.Blocks:
    """The page; API clients find it as ``/answer``."""
    finetunes, examples = source.finetunes, source.examples

    def chosen(event: gr.SelectData) -> tuple[Image.Image, str, str, str, dict]:
        image, task, question, truth = examples[event.index]
        return image, task, question, "", gr.update(value=truth, visible=truth is not None)

    with gr.Blocks(
        title=f"mmpeft: {source.name}", analytics_enabled=False, delete_cache=(3600, 86400)
    ) as page:
        gr.HTML(f"<h1>{html.escape(source.name)}</h1><p>{source.about}</p>", elem_id="title")
        with gr.Row():
            image = gr.Image(
                label="Image", type="filepath", format="png", height=400, sources=["upload", "clipboard"],
                buttons=[], elem_id="image", placeholder="Drop an image here",
            )  # fmt: skip
            # gradio would open the file with pillow first, with other limits and other messages
            image.preprocess = lambda payload: payload and payload.path  # pyright: ignore
            with gr.Column():
                with gr.Row():
                    task = gr.Radio(
                        [QUESTION, CAPTION],
                        value=QUESTION,
                        label="Task",
                        min_width=240,
                        visible=source.captions,
                    )
                    finetune = gr.Dropdown(finetunes, value=finetunes[0], label="Finetune", min_width=120)
                question = gr.Textbox(label=QUESTION, placeholder="what color is the shape?")
                choices = gr.Textbox(
                    "", label="Choices", placeholder="red, green, blue - or nothing, for the run's own"
                )
                button = gr.Button("Ask", variant="primary")
                with gr.Row():
                    shown = gr.Textbox(label="Answer", max_lines=6, scale=4, elem_id="answer")
                    taken = gr.Textbox(label="Time", scale=1, min_width=90)
                ranking = gr.Textbox(
                    label="Ranking", max_lines=10, placeholder="of the choices, where there are some"
                )
                truth = gr.Textbox(label="Truth of this held-out example", visible=False)
        asking = (source.answer, [image, task, question, finetune, choices], [shown, taken, ranking])
        button.click(*asking, api_name="answer", show_progress_on=shown)
        for typed in (question, choices):
            typed.submit(*asking, api_visibility="private", show_progress_on=shown)
        quiet = {"api_visibility": "private", "queue": False}
        if examples:
            gallery = gr.Gallery(
                [(image, task if task == CAPTION else question) for image, task, question, _ in examples],
                label="Held-out examples: click one", columns=6, height="auto", format="png",
                allow_preview=False, interactive=False, buttons=[], elem_id="examples",
            )  # fmt: skip
            parts = [image, task, question, choices, truth]
            filled = gallery.select(chosen, None, parts, api_visibility="private")
            filled.then(*asking, api_visibility="private", show_progress_on=shown)
        with gr.Accordion("About this run", open=False, visible=bool(source.facts)):
            gr.HTML(source.facts, elem_id="facts")
            if source.report is not None:
                gr.Image(load_image(source.report), show_label=False, format="png", buttons=["fullscreen"])
        task.change(lambda task: gr.update(visible=task == QUESTION), task, question, **quiet)
        for edited in (image, question, task):  # the truth belonged to the example
            edited.input(lambda: gr.update(visible=False), None, truth, **quiet)
    # one question at a time: events with the same function share gradio's default limit of 1
    return page.queue(max_size=32, api_open=False)


def _answerer(vlm: mmpeft.VisionLanguageModel) -> Callable[..., tuple[str, str, str]]:
    asked = next((task for task in vlm.manifest.instructions if task and task != CAPTION_TASK), None)

    def answer(
        image: str | None, task: str, question: str | None, finetune: str, choices: str | None = ""
    ) -> tuple[str, str, str]:
        """Answers a question about an image, or describes it; with choices (comma-separated), picks the best of them.
        Returns the answer, the time it took, and the choices with their scores, a line each, the best first."""
        start = time.perf_counter()
        try:
            how = vlm.manifest.image_config
            loaded = load_image(Path(image).read_bytes(), how, source="the image") if image else None
            if task == QUESTION:
                text, name = _checked(question), asked
            elif loaded is None:
                raise RefusedError("a caption needs an image: upload one or click an example")
            else:
                text, name = vlm.caption_instruction, CAPTION_TASK
            given = read_choices(_checked(choices, "choices")) if (choices or "").strip() else None
            found = reply(vlm, loaded, text, finetune, name, given)
        except RefusedError as error:
            raise gr.Error(html.escape(str(error), quote=False), print_exception=False) from None
        text = found.text if found.text.strip() else f"({found.remarks.pop()})"
        for remark in found.remarks:
            gr.Warning(html.escape(remark, quote=False))
        ranking = "\n".join(f"{choice}  {score:.4f}" for choice, score in found.ranking)
        return text, f"{time.perf_counter() - start:.2f} s", ranking

    return answer


def _server_answerer(server: Server) -> Callable[..., Iterator[tuple[str, str, str]]]:
    def answer(
        image: str | None, task: str, question: str | None, finetune: str, choices: str | None = ""
    ) -> Iterator[tuple[str, str, str]]:
        """Asks the server a question, about an image or without one; with choices (comma-separated), picks the best of
        them. The answer so far, the time it took, and the choices with their scores, a line each, the best first."""
        start, text = time.perf_counter(), ""

        def shown(text: str, ranking: str = "") -> tuple[str, str, str]:
            return text, f"{time.perf_counter() - start:.2f} s", ranking

        try:
            if task != QUESTION:
                raise RefusedError("a server is asked questions; for a caption, ask for a description")
            asked = _checked(question)
            if (choices or "").strip():
                given = read_choices(_checked(choices, "choices"))
                check_choices(given, "the choices")
                ranking = server.rank(asked, image, finetune, given)
                yield shown(ranking[0][0], "\n".join(f"{choice}  {score:.4f}" for choice, score in ranking))
                return
            for piece in server.write(asked, image, finetune):
                text += piece
                yield shown(text)
            if not text.strip():
                yield shown(f"({finetune} ended its answer at once: it wrote nothing)")
        except RefusedError as error:
            raise gr.Error(html.escape(str(error), quote=False), print_exception=False) from None

    return answer


def _checked(text: str | None, what: str = "a question") -> str:
    if not 0 < len((text or "").strip()) <= LONGEST_QUESTION:
        raise RefusedError(f"type {what} of 1 to {LONGEST_QUESTION} characters")
    return str(text)


def main(
    run: str = RUN,
    host: str = "127.0.0.1",
    port: int = 7860,
    share: bool = False,
    server: str | None = None,
    api_key: str | None = None,
) -> None:
    """Opens a web page to ask a finetuned model about images.

    Args:
        run: directory that `mmpeft fit` wrote.
        host: address to listen on; 0.0.0.0 lets other machines in.
        port: port to listen on.
        share: also make a public address, through a tunnel of gradio's makers.
        server: address of `mmpeft serve`, or of another server of OpenAI's API, to ask instead of loading a run.
        api_key: the server's, where it wants one.
    """
    try:
        named = named_server(server, api_key, run)
        source = of_run(mmpeft.load(run), Path(run)) if named is None else of_server(named)
    except RefusedError as error:
        sys.exit(f"error: {error}")
    if share or host not in ("127.0.0.1", "localhost", "::1"):
        print("warning: whoever reaches this address can use the model; there is no login", file=sys.stderr)
    build(source).launch(server_name=host, server_port=port, share=share, **LAUNCH)


def _read_examples(run: Path) -> list[Example]:
    """(image, task, question, truth) of the run's held-out examples that have an image."""
    path = run / "examples" / "examples.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    images = [load_image(path.parent / Path(row["image"]).name) if row["image"] else None for row in rows]
    tasks = [CAPTION if row["task"] == CAPTION_TASK else QUESTION for row in rows]
    rows = zip(images, tasks, rows, strict=True)
    return [(image, task, row["question"], row["truth"]) for image, task, row in rows if image]


def _facts(vlm: mmpeft.VisionLanguageModel) -> str:
    facts = {**vlm.manifest.facts, **readable(vlm.manifest.metrics)}
    cells = ((html.escape(name.replace("_", " ")), html.escape(str(value))) for name, value in facts.items())
    return f"<table>{''.join(f'<tr><td>{name}</td><td>{value}</td></tr>' for name, value in cells)}</table>"


if __name__ == "__main__":
    # jsonargparse's booleans want a value; a lone --share is what people type
    auto_cli(main, args=["--share=true" if argument == "--share" else argument for argument in sys.argv[1:]])

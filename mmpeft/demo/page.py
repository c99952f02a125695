"""The demo's page: where everything stands, for any source of answers."""

import os
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read once, when gradio is imported

import gradio as gr
from PIL import Image

from mmpeft.data.video import NUM_FRAMES
from mmpeft.demo.asked import CAPTION, MOST_TOGETHER, QUESTION, Conversation
from mmpeft.demo.board import facts_table, text
from mmpeft.demo.events import connect
from mmpeft.demo.parts import Parts, upload_gallery
from mmpeft.demo.source import About, Example, Source
from mmpeft.demo.style import CSS
from mmpeft.demo.uploads import MOST_FRAMES, VIDEO_MB

LAUNCH: dict[str, Any] = {
    "max_file_size": f"{VIDEO_MB}mb",
    "theme": gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    "css": CSS,
    "footer_links": ["api", "settings"],
}
"""How `build`'s page is launched, here and in tests."""
AT_ONCE, WAITING = 8, 64
"""Questions of the page that are under way together, and that wait for them."""


def build(source: Source) -> gr.Blocks:
    """The page; API clients find it as ``/answer``."""
    with gr.Blocks(
        title=f"mmpeft: {source.name}", analytics_enabled=False, delete_cache=(3600, 86400)
    ) as page:
        gr.HTML(f"<h1>{text(source.name)}</h1><p>{text(source.told)}</p>", elem_id="title")
        if not source.about:
            connect(source, _asking(source))
        else:
            with gr.Tab("Ask"):
                parts = _asking(source)
            with gr.Tab("About the run" if len(source.about) == 1 else "About the runs"):
                for about in source.about:
                    _about(about, titled=len(source.about) > 1)
            connect(source, parts)
    return page.queue(max_size=WAITING, default_concurrency_limit=AT_ONCE, api_open=False)


def _asking(source: Source) -> Parts:
    with gr.Row():
        with gr.Column(scale=4, min_width=300):
            asked = _question(source)
        with gr.Column(scale=5, min_width=300):
            shown = _answers()
    parts = Parts(**asked, **shown, conversation=gr.State(Conversation()))
    if source.examples:
        parts.examples = gr.Gallery(
            [(own.images[0].image, _label(own)) for own in source.examples],
            label="Held-out examples: click one", columns=6, height="auto", format="png",
            allow_preview=False, interactive=False, buttons=[], elem_id="examples",
        )  # fmt: skip
    return parts


def _question(source: Source) -> dict[str, Any]:
    return {
        "images": upload_gallery("Images and videos" if source.videos else "Images"),
        "task": gr.Radio([QUESTION, CAPTION], value=QUESTION, label="Task", visible=source.captions),
        "question": gr.Textbox(label=QUESTION, placeholder="what color is the shape?", max_lines=4),
        "finetunes": gr.Dropdown(
            source.finetunes,
            value=source.finetunes[:1],
            multiselect=True,
            max_choices=MOST_TOGETHER,
            label="Who answers: several side by side",
        ),
        "choices": gr.Textbox(
            "", label="Choices", placeholder="red, green, blue - or nothing, for the finetune's own"
        ),
        "remember": gr.Checkbox(
            False, label="Remember: read the earlier questions about these images and their answers too"
        ),
        "heat_map": gr.Checkbox(
            False, label="Heat map: what of the images the answer rests on", visible=source.explains
        ),
        "frames": gr.Slider(
            1, MOST_FRAMES, NUM_FRAMES, step=1, label="Frames of each video", visible=False, elem_id="frames"
        ),
        **_buttons(),
    }


def _buttons() -> dict[str, Any]:
    with gr.Row():
        ask = gr.Button("Ask", variant="primary", min_width=100)
        clear = gr.Button("New conversation", min_width=100)
    return {"ask": ask, "clear": clear}


def _answers() -> dict[str, Any]:
    board = gr.HTML("", elem_id="board", js_on_load=None, min_height=60)
    with gr.Accordion("Copy as code", open=False):
        with gr.Tab("Python"):
            python = gr.Code(language="python", interactive=False, show_label=False, wrap_lines=True)
        with gr.Tab("curl"):
            curl = gr.Code(language="shell", interactive=False, show_label=False, wrap_lines=True)
    return {"board": board, "python": python, "curl": curl, "answers": gr.JSON(visible=False)}


def _about(about: About, titled: bool) -> None:
    if titled:
        gr.HTML(f"<h2>{text(about.name)}</h2>")
    for name, picture in about.pictures[:1]:
        _picture(name, picture)
    with gr.Row():
        for name, picture in about.pictures[1:]:
            with gr.Column(min_width=300):
                _picture(name, picture)
    if about.facts:
        gr.HTML(facts_table(about.facts), elem_classes="facts")
    if about.card:
        with gr.Accordion("Model card", open=False):
            gr.Markdown(about.card, elem_classes="facts")


def _picture(name: str, picture: Image.Image) -> None:
    gr.Image(picture, label=name, show_label=False, format="png", buttons=["fullscreen"], interactive=False)


def _label(example: Example) -> str:
    """As text, which the gallery shows as it is."""
    more = f" ({len(example.images)} images)" if len(example.images) > 1 else ""
    return (example.task if example.task == CAPTION else example.question) + more

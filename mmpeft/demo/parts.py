"""The components of the demo's page that something happens to. The gallery of uploads is gradio's, except that files
come and are shown under the names that they were uploaded by."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from mmpeft.data.images.formats import ENDINGS, VIDEO_ENDINGS
from mmpeft.demo.asked import Upload
from mmpeft.demo.source import Picture


@dataclass
class Parts:
    """As the page made them."""

    images: gr.Gallery
    task: gr.Radio
    question: gr.Textbox
    finetunes: gr.Dropdown
    choices: gr.Textbox
    remember: gr.Checkbox
    heat_map: gr.Checkbox
    frames: gr.Slider
    ask: gr.Button
    clear: gr.Button
    answers: gr.JSON
    board: gr.HTML
    python: gr.Code
    curl: gr.Code
    conversation: gr.State
    examples: gr.Gallery | None = None


def upload_gallery(label: str) -> gr.Gallery:
    """A gallery whose value is a list of `Upload` for every function that reads it. A function may give back uploads or
    pictures, but no ``gr.update`` and no ``gr.skip``: of these gradio makes a new gallery, which is its own again."""
    gallery = gr.Gallery(
        label=label, sources=["upload", "clipboard", "webcam"],
        file_types=["image", "video", *ENDINGS, *VIDEO_ENDINGS], columns=2, fit_columns=False, height=240,
        format="png", object_fit="contain", buttons=[], interactive=True, elem_id="images",
    )  # fmt: skip
    postprocess = gallery.postprocess

    def shown(value: Sequence[Upload | Picture] | None) -> Any:
        data = postprocess([own.path if isinstance(own, Upload) else own.image for own in value or ()])
        for own, given in zip(data.root, value or (), strict=True):
            _file(own).orig_name = given.name
        return data

    # gradio would look at the files first, with other limits and other messages
    gallery.preprocess = uploads_of  # pyright: ignore
    gallery.postprocess = shown  # pyright: ignore
    return gallery


def uploads_of(payload: Any) -> list[Upload]:
    """The files of a gallery's payload."""
    files = list(map(_file, payload.root)) if payload else []
    return [Upload(file.path, file.orig_name or Path(file.path).name) for file in files]


def _file(own: Any) -> Any:
    """Of an image or a video."""
    return getattr(own, "image", None) or own.video

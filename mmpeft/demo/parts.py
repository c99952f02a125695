"""The components of the demo's page that something happens to."""

from dataclasses import dataclass

import gradio as gr


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
    ask: gr.Button
    clear: gr.Button
    answers: gr.JSON
    board: gr.HTML
    python: gr.Code
    curl: gr.Code
    conversation: gr.State
    truth: gr.State
    examples: gr.Gallery | None = None

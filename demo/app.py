"""A web page to ask a run: ``python demo/app.py --run runs/quickstart``, then open the address it prints.

Whatever people upload or type is untrusted: images go through the toolkit's decoder, and answers are shown as
text, never as HTML or Markdown. The page listens on this machine alone unless told otherwise.
"""

import html
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read once, when gradio is imported

import gradio as gr
from jsonargparse import auto_cli
from PIL import Image

import mmpeft
from mmpeft.data.images import load_image

BASE = "base"
CAPTION, QUESTION = "Caption", "Question"
LONGEST_QUESTION = 2000
"""Characters. The run's own limit counts tokens; this one spares the tokenizer a megabyte of text."""
MAX_UPLOAD = "20mb"
MAX_WAITING = 32
HOUR = 3600
LOCAL = ("127.0.0.1", "localhost", "::1")
SHARED = (
    "warning: everyone who reaches this address can use the model and this machine's time; there is no login. "
    "Leave out --share and --host to keep the page to yourself"
)
CSS = """
.gradio-container {max-width: 1080px !important; margin: auto}
#title h1 {font-size: 1.7rem; font-weight: 700; margin: 0.4rem 0 0.2rem}
#title p {color: var(--body-text-color-subdued); margin: 0}
#answer textarea {font-size: 1.25rem; font-weight: 600}
#facts table {width: 100%; border-collapse: collapse}
#facts td {padding: 0.45rem 0.6rem; border-bottom: 1px solid var(--border-color-primary)}
#facts td:first-child {color: var(--body-text-color-subdued); width: 11rem}
"""
LAUNCH = {
    "max_file_size": MAX_UPLOAD,
    "theme": gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    "css": CSS,
    "footer_links": ["api"],
    "ssr_mode": False,
}
"""How `build`'s page is launched, here and in tests."""


def build(vlm: mmpeft.VisionLanguageModel, run: str | Path) -> gr.Blocks:
    """The page of a loaded run; API clients find it as ``/answer``."""
    run = Path(run)
    asked = next((task for task in vlm.manifest.instructions if task and task != "caption"), None)
    finetunes = [*vlm.adapters, BASE]
    examples = _read_examples(run)

    def answer(image: str | None, task: str, question: str, finetune: str) -> tuple[str, str]:
        """Answers a question about an image, or describes it. Returns the answer and the time it took."""
        try:
            loaded = load_image(Path(image).read_bytes(), source="the image") if image else None
            start = time.perf_counter()
            if task == CAPTION:
                if loaded is None:
                    raise ValueError("a caption needs an image: upload one or click an example")
                text = vlm.caption(loaded, finetune)
            else:
                if not question.strip():
                    raise ValueError("the question is empty: type one")
                if len(question) > LONGEST_QUESTION:
                    raise ValueError(f"the question has {len(question)} characters; at most {LONGEST_QUESTION}")
                text = vlm.ask(loaded, question, finetune, task=asked)
        except (ValueError, KeyError) as error:
            message = str(error.args[0] if error.args else error)
            raise gr.Error(html.escape(message, quote=False), print_exception=False) from None
        return text, f"{time.perf_counter() - start:.2f} s"

    def chosen(event: gr.SelectData) -> tuple[Image.Image, str, str, dict]:
        image, row = examples[event.index]
        task = CAPTION if row["task"] == "caption" else QUESTION
        return image, task, row["question"], gr.update(value=row["truth"], visible=True)

    with gr.Blocks(title=f"mmpeft: {run.name}", analytics_enabled=False, delete_cache=(HOUR, HOUR)) as page:
        gr.HTML(_title(vlm, run), elem_id="title")
        with gr.Row():
            image = gr.Image(label="Image", type="filepath", format="png", height=380, sources=["upload", "clipboard"], buttons=[])
            # gradio would open the file with pillow first, with other limits and other messages
            image.preprocess = lambda payload: payload and payload.path  # pyright: ignore
            with gr.Column():
                with gr.Row():
                    task = gr.Radio([QUESTION, CAPTION], value=QUESTION, label="Task")
                    finetune = gr.Dropdown(finetunes, value=finetunes[0], label="Finetune", min_width=140)
                question = gr.Textbox(label=QUESTION, placeholder="what color is the shape?", lines=1, max_length=LONGEST_QUESTION)
                button = gr.Button("Ask", variant="primary")
                with gr.Row():
                    shown = gr.Textbox(label="Answer", lines=1, max_lines=6, scale=4, elem_id="answer", buttons=["copy"])
                    taken = gr.Textbox(label="Time", scale=1, min_width=90)
                truth = gr.Textbox(label="Truth of this held-out example", visible=False)
        outputs, inputs = [shown, taken], [image, task, question, finetune]
        if examples:
            captions = [(picture, f"{row['question']} {row['truth']}") for picture, row in examples]
            gallery = gr.Gallery(
                captions, label="Held-out examples: click one", columns=6, height="auto", object_fit="contain",
                format="png", allow_preview=False, interactive=False, buttons=[],
            )  # fmt: skip
            filled = gallery.select(chosen, None, [image, task, question, truth], api_visibility="private")
            filled.then(answer, inputs, outputs, api_visibility="private", concurrency_id="model")
        if (run / "report.png").is_file() or vlm.manifest.facts:
            with gr.Accordion("About this run", open=False):
                gr.HTML(_facts(vlm), elem_id="facts")
                if (run / "report.png").is_file():
                    gr.Image(load_image(run / "report.png"), show_label=False, format="png", buttons=["fullscreen"])
        asking = {"fn": answer, "inputs": inputs, "outputs": outputs, "concurrency_id": "model"}
        button.click(**asking, api_name="answer")
        question.submit(**asking, api_visibility="private")
        task.change(lambda task: gr.update(visible=task == QUESTION), task, question, api_visibility="private", queue=False)
        changes = [image.input, question.input, task.input]
        gr.on(changes, lambda: gr.update(visible=False), None, truth, api_visibility="private", queue=False)
    return page.queue(max_size=MAX_WAITING, default_concurrency_limit=1)


def main(run: str = "runs/quickstart", host: str = "127.0.0.1", port: int = 7860, share: bool = False) -> None:
    """Opens a web page to ask a finetuned model about images.

    Args:
        run: directory that `mmpeft fit` wrote.
        host: address to listen on; 0.0.0.0 lets other machines in.
        port: port to listen on.
        share: also make a public address, through a tunnel of gradio's makers.
    """
    try:
        vlm = mmpeft.load(run)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if share or host not in LOCAL:
        print(SHARED, file=sys.stderr)
    build(vlm, run).launch(server_name=host, server_port=port, share=share, **LAUNCH)


def _read_examples(run: Path) -> list[tuple[Image.Image, dict]]:
    """The run's held-out examples that have an image."""
    path = run / "examples" / "examples.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [(load_image(path.parent / row["image"]), row) for row in rows if row["image"]]


def _title(vlm: mmpeft.VisionLanguageModel, run: Path) -> str:
    parts = (vlm.manifest.language["name"], vlm.manifest.vision["name"], f"on {vlm.model.device}")
    return f"<h1>{html.escape(run.resolve().name)}</h1><p>{html.escape('  ·  '.join(map(str, parts)))}</p>"


def _facts(vlm: mmpeft.VisionLanguageModel) -> str:
    facts = {**vlm.manifest.facts, **vlm.manifest.metrics}
    rows = (f"<tr><td>{html.escape(name)}</td><td>{html.escape(str(value))}</td></tr>" for name, value in facts.items())
    return f"<table>{''.join(rows)}</table>"


if __name__ == "__main__":
    # jsonargparse's booleans want a value; a lone --share is what people type
    auto_cli(main, args=["--share=true" if argument == "--share" else argument for argument in sys.argv[1:]])

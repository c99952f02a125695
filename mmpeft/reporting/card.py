"""``README.md`` of a run directory: a model card that a person and the Hugging Face hub can read."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from mmpeft.options import command_line
from mmpeft.reporting.canvas import one_line, printable
from mmpeft.reporting.report import ShownExample
from mmpeft.reporting.tables import markdown_table

EMBEDDED_ORIGINS = {"embedded/smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Hub models that the embedded ones were made from: ``base_model`` tells descent."""
HUB_ID = re.compile(r"(?!embedded/)[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
MAX_EXAMPLES, MAX_CELL = 12, 200
MADE_BY = "This command trains it again, from the folder that the paths in `config.yaml` are relative to:"
IDENTITY = "Names and hashes of what it was trained on. mmpeft refuses to load it with anything else."
ASKED = "Questions that were not trained on, with its answers: ✓ right, ✗ wrong."
COUNTS = ("questions", "cut_answers")
"""What stands among the metrics and is none."""
VERDICTS = {True: "✓", False: "✗", None: ""}


def model_card(
    manifest: Mapping[str, Any],
    *,
    title: str,
    metrics: Mapping[str, float],
    facts: Mapping[str, str],
    examples: Sequence[ShownExample],
    command: str,
    pictures: Sequence[str] = (),
) -> str:
    """The card as markdown with YAML front matter. No text of the user's can break either.

    Args:
        manifest: the content of ``mmpeft.json``.
        metrics: names and values; those between 0 and 1 are named in the front matter.
        command: the command line that made the run.
        pictures: files beside the card that are shown with the facts.
    """
    base, adapters = str(manifest["language"]["name"]), list(manifest.get("adapters", []))
    encoder, tasks = manifest["vision"], [task for task in manifest.get("instructions", {}) if task]
    rows = [(e.question, e.truth or "", f"{VERDICTS[e.right]} {e.answer}") for e in examples[:MAX_EXAMPLES]]
    parts = [
        _front_matter(base, metrics),
        f"# {_text(title)}",
        _summary(base, adapters, encoder),
        "![report](report.png)",
        f"## Use\n\n{_usage(base, adapters, examples, sees=encoder is not None)}",
        f"## Facts\n\n{_table(('', ''), facts.items())}" if facts else "",
        *(f"![{Path(name).stem}]({name})" for name in pictures),
        f"## Examples\n\n{ASKED}\n\n{_table(('question', 'truth', 'answer'), rows)}" if rows else "",
        f"## Made by\n\n{MADE_BY}\n\n{_code('bash', *command.splitlines())}",
        f"## Identity\n\n{IDENTITY}\n\n{_table(('', ''), _identity(manifest))}",
        f"## Limits\n\n{_limits(tasks)}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _summary(base: str, adapters: Sequence[str], encoder: Mapping[str, Any] | None) -> str:
    """What the folder holds, and what it needs that it does not hold."""
    projector = "a projector, which turns the features of an image into what the language model reads"
    finetunes = (
        f"the {'finetune' if len(adapters) == 1 else 'finetunes'} {_list(adapters)}" if adapters else ""
    )
    held = " and ".join(part for part in (finetunes, projector if encoder else "") if part)
    eyes = f" and the image encoder {_text(encoder['name'])}" if encoder else ""
    return (
        f"This folder, made by mmpeft, holds {held}. Not in it but needed: the frozen language model "
        f"{_text(base)}{eyes}, which mmpeft loads by name.{'' if encoder else ' It reads text, no images.'}"
    )


def _limits(tasks: Sequence[str]) -> str:
    """What to know before relying on it, as a list."""
    trained = f"tasks called {_list(tasks)}" if tasks else "one kind of task"
    return (
        "- The limits, biases and licences of language model, image encoder and training data are its own too.\n"
        f"- It was trained on {trained}; how it does on others is not known.\n"
        "- Exact match is strict: case, punctuation and wording count. It says little about long free text."
    )


def _front_matter(base: str, metrics: Mapping[str, float]) -> str:
    """YAML that the hub accepts: a base that is no hub id, such as a local path, is left out."""
    base = EMBEDDED_ORIGINS.get(base, base)
    data = ModelCardData(
        library_name="mmpeft",
        pipeline_tag="image-text-to-text",
        base_model=base if HUB_ID.fullmatch(base) else None,
        tags=["mmpeft", "peft", "vision-language"],
        metrics=[
            printable(name)
            for name, value in metrics.items()
            if 0 <= value <= 1 and "/" not in name and name not in COUNTS
        ]
        or None,
    )
    return f"---\n{data.to_yaml()}\n---"


def _usage(base: str, adapters: Sequence[str], examples: Sequence[ShownExample], sees: bool) -> str:
    """Code to paste, about the first example with an image where there is one that can be asked so."""
    whole = [example for example in examples if example.whole]
    shown = next(
        (e for e in whole if e.image), ShownExample("photo.png", "what is in the picture?", None, "")
    )
    path = Path(str(shown.image))
    image = f"examples/{path.name}" if path.parent.name == "examples" else "photo.png"
    if not sees:
        shown = whole[0] if whole else ShownExample(None, "what is it?", None, "")
    ask = f"vlm.ask({_quoted(image) if sees else None}, {_quoted(shown.question)})"
    option = ["--image", printable(image)] if sees else []
    shell = command_line("ask", "--run", ".", *option, printable(shown.question))
    parts = [
        "With mmpeft installed, from inside this directory (from elsewhere write its path instead of `.`):",
        _code("python", "import mmpeft", "", 'vlm = mmpeft.load(".")', f"print({ask})"),
        _code("bash", shell),
    ]
    if adapters:
        embedded, source = base.startswith("embedded/"), _quoted(base)
        parts += [
            "The adapter is in the format of Hugging Face's PEFT, which loads it without mmpeft"
            + ("; without the projector it reads text but no images:" if sees else ":"),
            _code(
                "python",
                *(["from mmpeft.paths import resolve"] if embedded else []),
                "from peft import PeftModel",
                "from transformers import AutoModelForCausalLM",
                "",
                f"source = {f'resolve({source})' if embedded else source}",
                "base = AutoModelForCausalLM.from_pretrained(source)",
                f"model = PeftModel.from_pretrained(base, {_quoted(f'adapters/{adapters[0]}')})",
            ),
        ]
    return "\n\n".join(parts)


def _identity(manifest: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """(what, name or hash) of everything that the run belongs to."""
    rows: list[tuple[str, Any]] = []
    for part, value in manifest.get("identity", {}).items():
        nested = value.items() if isinstance(value, Mapping) else [("", value)]
        rows += [(f"{part} {key}".strip(), item) for key, item in nested if item is not None]
    return [*rows, ("projector", manifest["projector"])] if manifest.get("projector") else rows


def _quoted(text: str) -> str:
    """A string literal that Python reads."""
    return json.dumps(printable(text), ensure_ascii=False)


def _text(text: object) -> str:
    """Text that markdown shows as it is."""
    return re.sub(r"([\\`*_{}\[\]<>|~$&#!])", r"\\\1", one_line(text))


def _list(names: Iterable[str]) -> str:
    return ", ".join(map(_text, names))


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    cut = [[t if len(t) <= MAX_CELL else t[: MAX_CELL - 1] + "…" for t in map(str, row)] for row in rows]
    return markdown_table(head, ([_text(cell) for cell in row] for row in cut))


def _code(language: str, *lines: str) -> str:
    """A fenced block whose fence is longer than any run of backticks in it."""
    longest = max(map(len, re.findall("`+", "\n".join(lines))), default=0)
    fence = "`" * max(3, longest + 1)
    return "\n".join([fence + language, *map(printable, lines), fence])

"""``README.md`` of a run directory: a model card that a person and the Hugging Face hub can read."""

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from mmpeft.reporting.canvas import one_line, printable
from mmpeft.reporting.report import ShownExample
from mmpeft.reporting.tables import markdown_table

EMBEDDED_ORIGINS = {"embedded/smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Hub models that the embedded ones were made from: ``base_model`` tells descent."""
HUB_ID = re.compile(r"(?!embedded/)[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
MAX_EXAMPLES, MAX_CELL = 12, 200
MADE_BY = "In the folder that the paths of `config.yaml` start from:"
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
    sight = f", which sees through {_text(encoder['name'])}" if encoder else ", on text alone"
    kind = f"Adapter {_list(adapters)}{' and a projector' if encoder else ''}" if adapters else "A projector"
    limits = [
        "It is a finetune: the limits, biases and licences of base, encoder and data are its own too.",
        "mmpeft loads it with the base, encoder and tokenizer identified above and refuses any other.",
        f"It was trained on {_list(tasks) or 'one kind of task'}; about others nothing is known.",
        "Exact match is strict: case, punctuation and wording count. It says little about long free text.",
    ]
    rows = [(e.question, e.truth or "", f"{VERDICTS[e.right]} {e.answer}") for e in examples[:MAX_EXAMPLES]]
    parts = [
        _front_matter(base, metrics),
        f"# {_text(title)}",
        f"{kind} for {_text(base)}{sight}; finetuned with mmpeft.",
        "![report](report.png)",
        f"## Use\n\n{_usage(base, adapters, examples, sees=encoder is not None)}",
        f"## Facts\n\n{_table(('', ''), facts.items())}" if facts else "",
        *(f"![{Path(name).stem}]({name})" for name in pictures),
        f"## Examples\n\n{_table(('question', 'truth', 'answer'), rows)}" if rows else "",
        f"## Made by\n\n{MADE_BY}\n\n{_code('bash', *command.splitlines())}",
        f"## Identity\n\n{_table(('', ''), _identity(manifest))}",
        "## Limits\n\n" + "\n".join(f"- {limit}" for limit in limits),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(base: str, metrics: Mapping[str, float]) -> str:
    """YAML that the hub accepts: a base that is no hub id, such as a local path, is left out."""
    base = EMBEDDED_ORIGINS.get(base, base)
    data = ModelCardData(
        library_name="mmpeft",
        pipeline_tag="image-text-to-text",
        base_model=base if HUB_ID.fullmatch(base) else None,
        tags=["mmpeft", "peft", "vision-language"],
        metrics=[printable(name) for name, value in metrics.items() if 0 <= value <= 1 and "/" not in name]
        or None,
    )
    return f"---\n{data.to_yaml()}\n---"


def _usage(base: str, adapters: Sequence[str], examples: Sequence[ShownExample], sees: bool) -> str:
    """Code to paste, about the first example with an image where there is one."""
    shown = next(
        (e for e in examples if e.image), ShownExample("photo.png", "what is in the picture?", None, "")
    )
    path = Path(str(shown.image))
    image = f"examples/{path.name}" if path.parent.name == "examples" else "photo.png"
    if not sees:
        shown = examples[0] if examples else ShownExample(None, "what is it?", None, "")
    ask = f"vlm.ask({_quoted(image) if sees else None}, {_quoted(shown.question)})"
    option = f"--image {shlex.quote(printable(image))} " if sees else ""
    shell = f"mmpeft ask --run . {option}{shlex.quote(printable(shown.question))}"
    parts = [
        "From inside this directory (from elsewhere write its path instead of `.`):",
        _code("python", "import mmpeft", "", 'vlm = mmpeft.load(".")', f"print({ask})"),
        _code("bash", shell),
    ]
    if adapters:
        embedded, source = base.startswith("embedded/"), _quoted(base)
        parts += [
            "The adapter alone is in PEFT's format"
            + (". Without the projector it reads text but no images:" if sees else ":"),
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

"""The data set `manual`: paragraphs of English prose to measure forgetting on, from Python's language reference.

No finetune here trains on them. What counts is the perplexity of the plain text, without template; an instruction
stands beside it only because every row of a data file is a conversation, whose answer the paragraph is.
"""

import ast
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from mmpeft.samples.rows import draw, write_rows
from mmpeft.samples.sample import PrepareError
from mmpeft.samples.standard_library import MARKUP, write_readme

MOST = 300
"""Paragraphs kept."""
WORDS = range(40, 121)
"""Length of a paragraph."""
INSTRUCTION = "Write a paragraph of a manual."


def build_manual(root: Path, folder: Path) -> None:
    """Writes held.jsonl ({id, instruction, text}); of ``root`` nothing is needed.

    Raises:
        PrepareError: this Python came without the texts of `help()`.
    """
    path = Path(sysconfig.get_path("stdlib")) / "pydoc_data" / "topics.py"
    if not path.is_file():
        raise PrepareError(f"{path} is not there; use a Python that has its standard library as files")
    kept = sorted(paragraphs(read_topics(path.read_text(encoding="utf-8"))), key=draw)[:MOST]
    write_rows(
        folder / "held.jsonl",
        (
            {"id": f"manual-{number:03d}", "instruction": INSTRUCTION, "text": text}
            for number, text in enumerate(kept)
        ),
    )
    write_readme(folder, "paragraphs of the language reference", [f"held: {len(kept)} paragraphs"])


def read_topics(source: str) -> dict[str, str]:
    """The one dict that the file assigns: topic -> text."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return ast.literal_eval(node.value)
    raise PrepareError("pydoc_data/topics.py assigns no dict of topics; use another Python")


def paragraphs(topics: dict[str, str]) -> set[str]:
    """The prose paragraphs of `WORDS` words, each once: no grammar, no code, no lists, no tables."""
    return {text for topic in topics.values() for text in _prose(topic) if len(text.split()) in WORDS}


def _prose(topic: str) -> Iterator[str]:
    for block in re.split(r"\n\s*\n", topic):
        text = _without_markup(" ".join(re.sub(r"(?<=\w-)\n\s*", "", block).split()))
        written = re.match(r"[A-Z]", text) and text.endswith(".") and not MARKUP.search(text)
        if written and not re.search(r"::=|>>>|-{3}|={3}|[{}|]{2}|__{3}|https?:", text):
            yield text


def _without_markup(text: str) -> str:
    """Text whose emphasis, code marks and footnote numbers are gone."""
    text = re.sub(r"\*(\w[^*]*)\*|\"([^\"]+)\"|``?([^`]+)``?", lambda m: m[1] or m[2] or m[3], text)
    return re.sub(r" \[\d+\]", "", text)

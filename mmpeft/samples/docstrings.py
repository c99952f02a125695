"""The data set `docstrings`: a signature of Python's standard library -> the sentence that documents it.

Rows of task "document". A module is in one split only, so that the held-out functions are those of unseen modules,
and no sentence occurs twice.
"""

from pathlib import Path

from mmpeft.samples.rows import SPLITS, conversation, split_of, write_rows
from mmpeft.samples.standard_library import Documented, documented, write_readme

HELD_OUT = {"val": 0.1, "test": 0.1}
"""Shares of the modules."""


def build_docstrings(root: Path, folder: Path) -> None:
    """Writes train.jsonl, val.jsonl and test.jsonl; of ``root`` nothing is needed."""
    splits: dict[str, list[Documented]] = {split: [] for split in SPLITS}
    for entry in documented():
        splits[split_of(f"docstrings {entry.module}", **HELD_OUT)].append(entry)
    for split, entries in splits.items():
        write_rows(folder / f"{split}.jsonl", map(_row, entries))
    counts = (
        f"{split}: {len(entries)} sentences of {len({entry.module for entry in entries})} modules"
        for split, entries in splits.items()
    )
    write_readme(folder, "signatures and the sentences that document them", counts)


def _row(entry: Documented) -> dict:
    name = f"{entry.module}.{entry.signature}"
    question = f"What does {name} do?" if name.endswith(")") else f"What is {name}?"
    return conversation(f"docstrings-{entry.path}", "document", question, entry.summary)

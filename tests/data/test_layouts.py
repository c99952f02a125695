"""Layouts of public tools and data sets: each is read as it was meant, or refused by name.

The table of docs/data.md is made of them: `MMPEFT_WRITE_DOCS=1 pytest tests/data/test_layouts.py` writes it.
"""

import importlib
import os
import re
from pathlib import Path

import pytest

from mmpeft.data.layouts.columns import Columns
from mmpeft.data.sources import DataError, load_records
from tests.data.layouts.layout import Layout

MODULES = sorted(path.stem for path in (Path(__file__).parent / "layouts").glob("*.py"))
LAYOUTS: list[Layout] = [
    layout
    for module in MODULES
    for layout in getattr(importlib.import_module(f"tests.data.layouts.{module}"), "LAYOUTS", [])
]
DOCS = Path("docs/data.md")
BEGIN, END = "<!-- layouts -->\n", "<!-- /layouts -->\n"


def load(layout: Layout, folder: Path) -> list:
    settings = dict(layout.settings)
    columns = Columns(settings.pop("columns", {}), settings.pop("ignore", ()))
    source = layout.write(folder)
    of_the_hub = not any(folder.iterdir())
    return load_records(source if of_the_hub else folder / source, columns, **settings)


def same_images(record, folder: Path) -> list:
    root = os.path.realpath(folder)
    return [
        image if isinstance(image, bytes) else os.path.relpath(image, root).replace(os.sep, "/")
        for image in record["images"]
    ]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_a_layout_is_read_as_meant_or_refused(layout, tmp_path):
    if layout.needs:
        pytest.importorskip(layout.needs)
    if layout.refused is not None:
        assert layout.records is None
        with pytest.raises(DataError) as caught:
            load(layout, tmp_path)
        assert layout.refused in str(caught.value)
        assert "2 problem" not in str(caught.value), "one fault is one line"
        return
    assert layout.records
    records = load(layout, tmp_path)
    assert len(records) == len(layout.records)
    assert len({record["id"] for record in records}) == len(records)
    for record, wanted in zip(records, layout.records, strict=True):
        found = {**record, "images": same_images(record, tmp_path)}
        assert {key: found.get(key) for key in wanted} == wanted


def test_names_are_told_apart():
    names = [layout.name for layout in LAYOUTS]
    assert len(set(names)) == len(names)


def shown(text: str | None, most: int = 48) -> str:
    if text is None:
        return "?"
    flat = re.sub(r"\s+", " ", text)
    flat = flat if len(flat) <= most else flat[:most].rstrip() + "..."
    return in_cell(flat)


def in_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("](", "]\\(")


def read_as(layout: Layout) -> str:
    assert layout.records
    first = layout.records[0]
    turns = [f"{shown(question)} → {shown(answer)}" for question, answer in first["turns"]]
    extras = [f"system: {shown(first['system'])}"] if first.get("system") else []
    extras += [f"choices: {shown(', '.join(first['choices']))}"] if first.get("choices") else []
    extras += [f"{len(first['references'])} references"] if first.get("references") else []
    count = f"{len(layout.records)} records; " if len(layout.records) > 1 else ""
    return count + "; ".join([*turns, *extras])


def table() -> str:
    """Of all layouts, in the order of their names."""
    lines = ["| layout | read as, or refused for |", "|---|---|"]
    for layout in sorted(LAYOUTS, key=lambda layout: layout.name.lower()):
        told = read_as(layout) if layout.refused is None else f"**refused**: {shown(layout.refused, 90)}"
        lines.append(f"| {in_cell(layout.name)} | {told} |")
    good = sum(layout.refused is None for layout in LAYOUTS)
    head = f"{len(LAYOUTS)} layouts: {good} are read, {len(LAYOUTS) - good} are refused.\n\n"
    return head + "\n".join(lines) + "\n"


def test_the_table_of_layouts_is_that_of_the_docs():
    before, rest = DOCS.read_text().split(BEGIN)
    written, after = rest.split(END)
    if os.environ.get("MMPEFT_WRITE_DOCS"):
        DOCS.write_text(before + BEGIN + table() + END + after)
        return
    assert written == table()

"""Rows written into small files and read back, for the tests of sources."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from mmpeft.data.sources import DataError, load_records


def png(colour="red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2), colour).save(buffer, "PNG")
    return buffer.getvalue()


def write(folder: Path, *rows, name="data.jsonl") -> Path:
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def load_row(folder: Path, row, **options) -> dict:
    (record,) = load_records(write(folder, row), **options)
    return record


def refuse(folder: Path, row, message: str, **options) -> str:
    with pytest.raises(DataError, match=message) as caught:
        load_records(write(folder, row), **options)
    assert f"data.jsonl:{'element 1' if isinstance(row, list) else 1}" in str(caught.value)
    return str(caught.value)


def llava(*values, **row) -> dict:
    speakers = ("human", "gpt")
    turns = [{"from": speakers[number % 2], "value": value} for number, value in enumerate(values)]
    return {"conversations": turns, **row}


def qa(**row) -> dict:
    return {"question": "What?", "answer": "A cat.", **row}


WANTED_TURNS = [("<image>What?", "A cat.")]

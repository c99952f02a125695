"""What the layouts are written with: tiny images, text, JSON, tables, parquet and tars."""

import csv
import gzip
import io
import json
import tarfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

Members = Sequence[tuple[str, bytes | str]]


@cache
def png(colour: str = "red") -> bytes:
    """A small picture."""
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2), colour).save(buffer, "PNG")
    return buffer.getvalue()


@cache
def clip(frames: int = 12) -> bytes:
    """A video of grey pictures; needs PyAV."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream: Any = container.add_stream("mpeg4", rate=12)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for number in range(frames):
            frame = av.VideoFrame.from_image(Image.new("RGB", (32, 32), (20 * number,) * 3))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def images(folder: Path, *names: str) -> None:
    """Writes images, no two alike."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(f"#{number:02x}80ff"))


def text(folder: Path, name: str, content: str, encoding: str = "utf-8") -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode(encoding)
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return name


def lines(folder: Path, name: str, *rows: Any, encoding: str = "utf-8") -> str:
    """Writes one JSON object a line."""
    return text(folder, name, "".join(json.dumps(row) + "\n" for row in rows), encoding)


def document(folder: Path, name: str, value: Any, indent: int | None = None, encoding: str = "utf-8") -> str:
    return text(folder, name, json.dumps(value, indent=indent), encoding)


def table(
    folder: Path, name: str, *rows: Sequence[str], delimiter: str = ",", encoding: str = "utf-8"
) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, delimiter=delimiter).writerows(rows)
    return text(folder, name, buffer.getvalue(), encoding)


def parquet(folder: Path, name: str, *rows: dict, features: dict | None = None) -> str:
    """Writes parquet; `features` are Hugging Face's, as they stand in its metadata."""
    import pyarrow as pa
    from pyarrow import parquet as files

    made = pa.Table.from_pylist(list(rows))
    if features is not None:
        made = made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    files.write_table(made, folder / name)
    return name


def tar(folder: Path, name: str, members: Members) -> str:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / name, "w") as archive:
        for member, content in members:
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(member)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return name


def saved(folder: Path, name: str, splits: dict[str, list[dict]], features: Any = None) -> str:
    """What `save_to_disk` writes of a Dataset (one split, without name) or a DatasetDict."""
    import datasets

    sets = {split: datasets.Dataset.from_list(rows, features=features) for split, rows in splits.items()}
    made = sets[""] if "" in sets else datasets.DatasetDict(sets)
    made.save_to_disk(folder / name)
    return name

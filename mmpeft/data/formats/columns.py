"""Parquet and Arrow files -> rows, a few at a time: the file is never held.

Of parquet a page of a column is held, packed and unpacked, since it cannot be read in parts. It has 100 rows where
Hugging Face writes images, 1,024 where pandas does.

Hugging Face's features, which such a file carries, say which integers are classes: they become their names.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmpeft.data.formats.base import DataError, Rows
from mmpeft.data.formats.classes import class_row

BYTES = 2**20
"""Rows that are made into Python objects at a time have about so many."""
MOST_ROWS = 1024
BUFFER = 2**16
"""Bytes of a column that are read ahead; without it a whole column of a row group is."""


def parquet_rows(path: Path) -> Rows:
    """Rows numbered from 1."""
    from pyarrow import parquet

    def tables() -> Iterator[Any]:
        with parquet.ParquetFile(path, buffer_size=BUFFER, pre_buffer=False) as file:
            yield file.schema_arrow
            groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
            rows = min((_rows_at_once(group.total_byte_size, group.num_rows) for group in groups), default=1)
            yield from file.iter_batches(rows, use_threads=False)

    yield from _numbered(tables(), "parquet")


def arrow_rows(paths: list[Path], features: dict | None = None) -> Rows:
    """The rows of the stream files that `save_to_disk` writes, in order, numbered from 1."""
    import pyarrow as pa

    def tables() -> Iterator[Any]:
        for path in paths:
            with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
                yield stream.schema
                for batch in stream:
                    rows = _rows_at_once(batch.nbytes, batch.num_rows)
                    yield from (batch.slice(start, rows) for start in range(0, batch.num_rows, rows))

    yield from _numbered(tables(), "arrow", features)


def _rows_at_once(num_bytes: int, num_rows: int) -> int:
    return max(1, min(MOST_ROWS, BYTES * num_rows // max(1, num_bytes)))


def _numbered(tables: Iterator[Any], name: str, features: dict | None = None) -> Rows:
    import pyarrow as pa

    number = 0
    try:
        for table in tables:
            if isinstance(table, pa.Schema):
                features = features or features_of(table.metadata)
                continue
            for row in table.to_pylist():
                number += 1
                yield number, as_written(row, features)
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        yield number + 1, DataError(f"not readable as {name} ({reason:.200}); write the file again")


def features_of(metadata: dict[bytes, bytes] | None) -> dict:
    """Hugging Face's features in a schema's metadata."""
    written = json.loads((metadata or {}).get(b"huggingface", b"{}"))
    return (written.get("info") or {}).get("features") or {}


def as_written(row: dict[str, Any], features: dict | None) -> Any:
    """A row with classes by name and JSON read; NaN, which pandas writes for what is absent, is None."""
    row = {key: None if value != value else value for key, value in row.items()}
    classes: dict[str, list[str]] = {}
    for key, feature in (features or {}).items():
        kind = feature.get("_type") if isinstance(feature, dict) else None
        value = row.get(key)
        if kind == "Json" and isinstance(value, str):
            row[key] = json.loads(value)
        elif kind == "ClassLabel" and value is not None:
            classes[key] = feature["names"]
        elif kind in ("List", "Sequence", "LargeList") and isinstance(value, list):
            names = feature["feature"].get("names") if isinstance(feature.get("feature"), dict) else None
            row[key] = [names[number] for number in value] if names else value
    return class_row(row, classes) if classes else row

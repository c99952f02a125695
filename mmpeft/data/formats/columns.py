"""Parquet and Arrow files -> rows, a few at a time: the file is never held.

Of parquet a page of a column is held, packed and unpacked: 100 rows where Hugging Face writes images. Larger ones, as
pandas writes them, are read by `large_pages.py`.

Hugging Face's features, which such a file carries, say which integers are classes: they become their names.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmpeft.data.formats.base import DataError, Rows
from mmpeft.data.formats.classes import class_row
from mmpeft.data.formats.json_text import object_of
from mmpeft.data.formats.large_pages import is_large, values

BYTES = 2**20
"""Rows that are made into Python objects at a time have about so many."""
MOST_ROWS = 1024
BUFFER = 2**16
"""Bytes of a column that are read ahead; without it a whole column of a row group is."""


def parquet_rows(path: Path) -> Rows:
    """Rows numbered from 1."""
    from pyarrow import parquet

    def parts() -> Iterator[Any]:
        with parquet.ParquetFile(path, buffer_size=BUFFER, pre_buffer=False) as file:
            yield file.schema_arrow
            for number in range(file.num_row_groups):
                yield from _group_rows(path, file, number)

    yield from _numbered(parts(), "parquet")


def arrow_rows(paths: list[Path], features: dict | None = None) -> Rows:
    """The rows of the stream files that `save_to_disk` writes, in order, numbered from 1."""
    import pyarrow as pa

    def parts() -> Iterator[Any]:
        for path in paths:
            with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
                yield stream.schema
                for batch in stream:
                    rows = _rows_at_once(batch.nbytes, batch.num_rows)
                    for start in range(0, batch.num_rows, rows):
                        yield batch.slice(start, rows).to_pylist()

    yield from _numbered(parts(), "arrow", features)


def _rows_at_once(num_bytes: int, num_rows: int) -> int:
    return max(1, min(MOST_ROWS, BYTES * num_rows // max(1, num_bytes)))


def _group_rows(path: Path, file: Any, number: int) -> Iterator[list[dict[str, Any]]]:
    """The rows of a row group, a few at a time."""
    group = file.metadata.row_group(number)
    rows = _rows_at_once(group.total_byte_size, group.num_rows)
    leaves = {file.schema.column(place).path: place for place in range(group.num_columns)}
    apart = [name for name in leaves if _reads_apart(path, file, group, leaves[name])]
    columns = [name for name in leaves if name not in apart] if apart else None
    large = {
        name: values(path, group.column(leaves[name]), file.schema.column(leaves[name]).max_definition_level)
        for name in apart
    }
    for batch in file.iter_batches(rows, [number], columns, use_threads=False):
        made = batch.to_pylist() if batch.num_columns else [{} for _ in range(batch.num_rows)]
        for row in made if apart else ():
            for name, found in large.items():
                _put(row, name, *next(found))
        yield made if not apart else [{key: row.get(key) for key in file.schema_arrow.names} for row in made]


def _reads_apart(path: Path, file: Any, group: Any, place: int) -> bool:
    """Whether a leaf has pages too large for pyarrow: bytes in a column of their own, or in an object, not in lists."""
    leaf = file.schema.column(place)
    is_bytes = leaf.logical_type.type == "NONE" and leaf.max_repetition_level == 0
    return is_bytes and leaf.path.count(".") <= 1 and is_large(path, group.column(place))


def _put(row: dict[str, Any], name: str, level: int, value: bytes | None) -> None:
    """A leaf's value into its row; at level 0 its object is none."""
    column, _, key = name.partition(".")
    if not key:
        row[column] = value
    elif level and row.get(column) is None:
        row[column] = {key: value}
    elif level:
        row[column][key] = value
    else:
        row[column] = None


def _numbered(parts: Iterator[Any], name: str, features: dict | None = None) -> Rows:
    """The rows of schemas and lists of rows."""
    import pyarrow as pa

    number = 0
    try:
        for part in parts:
            if isinstance(part, pa.Schema):
                features = features or features_of(part.metadata)
                continue
            for row in part:
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
            row[key] = json.loads(value, object_pairs_hook=object_of)
        elif kind == "ClassLabel" and value is not None:
            classes[key] = feature["names"]
        elif kind in ("List", "Sequence", "LargeList") and isinstance(value, list):
            names = feature["feature"].get("names") if isinstance(feature.get("feature"), dict) else None
            row[key] = [names[number] for number in value] if names else value
    return class_row(row, classes) if classes else row

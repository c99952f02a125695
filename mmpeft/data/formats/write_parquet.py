"""Rows -> parquet, a group at a time; the bytes depend on the rows alone."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

KINDS = {"text": "string", "number": "float64"}


def write_parquet(
    path: Path, columns: Mapping[str, Any], groups: Iterable[Sequence[Mapping[str, Any]]]
) -> None:
    """Writes rows; what a row does not have is null.

    Args:
        path: of the file.
        columns: name -> "text", "number", or the fields of the objects in a list.
        groups: of rows, each in memory at a time.
    """
    import pyarrow as pa
    from pyarrow import parquet

    def kind(told: Any) -> Any:
        if isinstance(told, str):
            return pa.type_for_alias(KINDS[told])
        return pa.list_(pa.struct([(name, kind(own)) for name, own in told.items()]))

    schema = pa.schema([(name, kind(told)) for name, told in columns.items()])
    with parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        for group in groups:
            writer.write_table(
                pa.Table.from_pylist([{**dict.fromkeys(columns), **row} for row in group], schema)
            )

"""The mapping of columns under which rows that are not understood would be read, as a line to paste."""

import json
import re
from collections.abc import Mapping
from typing import Any

from mmpeft.data.formats import DataError
from mmpeft.data.layouts.columns import Columns, UnknownKeysError, propose_columns
from mmpeft.data.records import ImageRoot, Record, RecordReader, place_of
from mmpeft.errors import RefusedError
from mmpeft.options import command_line

PLAIN = re.compile(r"[A-Za-z_][\w.-]*")
"""A word that YAML reads as itself; of "yes", "null" and the like no column is called."""
SHOWN = 3


def propose_mapping(
    rows: list[dict[str, Any]], columns: Columns, task: str | None, root: ImageRoot, source: str
) -> list[str]:
    """Lines that say what would be read and how; none where no mapping helps.

    Args:
        rows: some that are refused.
        columns: what the user gave.
    """
    if not rows:
        return []
    new = propose_columns(rows)
    mapping, ignored = {**new, **columns.mapping}, list(columns.ignored)
    try:
        found = _read(rows, mapping, ignored, task, root)
    except RefusedError:  # what the user gave and what is proposed exclude each other
        return []
    if not found and new:
        left = sorted({key for row in rows for key in row} - {*mapping.values(), *ignored})
        return [
            f"{source}: columns that seem to be known: {flow(mapping)}; say in --columns too what the others are, or "
            f"in --ignore that they are nothing: {', '.join(left)}"
        ]
    if not found or (mapping, ignored) == (columns.mapping, columns.ignored):
        return []
    told = ["--columns", flow(mapping)] if mapping else []
    told += ["--ignore", *ignored] if ignored else []
    settings = [f"columns: {flow(mapping)}"] * bool(mapping) + [f"ignore: {json.dumps(ignored)}"] * bool(
        ignored
    )
    return [
        f"{source}: of {len(rows)} rows that are not understood {len(found)} would be read with",
        f"  {command_line('check', source, *told)}",
        f"in a config under data: {', '.join(settings)}; the first are then",
        *(f"  {describe(record)}" for record in found[:SHOWN]),
    ]


def describe(record: Record) -> str:
    """A record in a line."""
    turns = [f"{question!r:.100} -> {answer!r:.60}" for question, answer in record["turns"]]
    images = [image if isinstance(image, str) else f"{len(image):,} bytes" for image in record["images"]]
    system = f"system {record['system']!r:.60}; " if "system" in record else ""
    return f"{place_of(record)}: {', '.join(images) or 'no image'}; {system}{'; '.join(turns)}"


def flow(mapping: Mapping[str, str]) -> str:
    """A mapping in one line of YAML."""
    spelt = [f"{key}: {name if PLAIN.fullmatch(name) else json.dumps(name)}" for key, name in mapping.items()]
    return "{" + ", ".join(spelt) + "}"


def _read(
    rows: list[dict[str, Any]], mapping: dict[str, str], ignored: list[str], task: str | None, root: ImageRoot
) -> list[Record]:
    """What is read of the rows; keys that nothing else can be done about are added to ``ignored``."""
    found: list[Record] = []
    for number, row in enumerate(rows, 1):
        for _ in range(2):
            try:
                reader = RecordReader(root, task, columns=Columns(mapping, ignored))
                found += reader.read(row, f"{number}", f"row {number} of them")
            except UnknownKeysError as error:
                ignored += error.keys
                continue
            except DataError:
                pass
            break
    return found

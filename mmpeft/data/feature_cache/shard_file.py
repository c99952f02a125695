"""A shard: one safetensors file of one tensor, written row by row and read by memory map."""

import json
import struct
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from mmpeft.files import whole_file

SHARD_BYTES = 256_000_000
"""Most that a shard has: what a kill can cost, and no more than that is in flight."""
HEADER_BYTES = 256
"""Room for the header, which is known when the rows are; what it does not fill are spaces, as the format allows."""
NAMES = {torch.float16: "F16", torch.bfloat16: "BF16"}
"""dtype -> what safetensors calls it."""


def rows_per_shard(row_bytes: int) -> int:
    """At least one."""
    return max(1, (SHARD_BYTES - HEADER_BYTES) // row_bytes)


def write_shard(path: Path, rows: Iterable[Tensor], most: int) -> int:
    """Writes rows as they come, whole or not at all; no more than one of them is held. No rows write nothing.

    Args:
        path: the file.
        rows: (tokens, dim) each, of one dim and dtype, on the CPU.
        most: of them, for which there must be room on the disk.

    Returns:
        How many there were.

    Raises:
        RefusedError: there is no room.
    """
    every = iter(rows)
    if (first := next(every, None)) is None:
        return 0
    with whole_file(path, HEADER_BYTES + most * first.nbytes) as unfinished, unfinished.open("wb") as file:
        file.write(bytes(HEADER_BYTES))
        tokens: list[int] = []
        for row in chain([first], every):
            assert (row.shape[1], row.dtype) == (first.shape[1], first.dtype), (
                "features of one encoder are alike"
            )
            file.write(row.contiguous().view(torch.uint8).numpy().data)
            tokens.append(len(row))
        file.seek(0)
        file.write(_header(first, tokens))
    return len(tokens)


def map_shard(path: Path) -> Tensor:
    """(images, tokens, dim) as they lie on the disk, or (tokens of all images, dim) where images have different numbers
    of them: a row is read when it is used, and forgotten where memory is short.

    Raises:
        ValueError: it is no such file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        entry = json.loads(file.read(min(header_bytes, size)))["features"]
    dtype = next(dtype for dtype, name in NAMES.items() if name == entry["dtype"])
    # shared=False maps privately: nothing that is written to the tensor can reach the file
    content = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    return content[8 + header_bytes :].view(dtype).view(entry["shape"])


def _header(row: Tensor, tokens: list[int]) -> bytes:
    total, (_, dim) = sum(tokens), row.shape
    entry = {
        "dtype": NAMES[row.dtype],
        "shape": [total, dim] if len(set(tokens)) > 1 else [len(tokens), *row.shape],
        "data_offsets": [0, total * dim * row.element_size()],
    }
    text = json.dumps({"__metadata__": {"format": "pt"}, "features": entry}).encode()
    length = HEADER_BYTES - 8
    assert len(text) <= length, "a header of one tensor is short"
    return struct.pack("<Q", length) + text.ljust(length)

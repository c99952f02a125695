"""Hashes of weights and files, by which a finetune recognises the base it was made for."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 4096
CHUNKS_PER_FILE = 256


def hash_tensors(tensors: Mapping[str, "Tensor"]) -> str:
    """Identity of named tensors: names, shapes, dtypes and every byte. Of sharded ones all processes ask."""
    import torch  # here, so that the identities of plain data need no torch

    from mmpeft.transfer import whole

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(whole(tensor.detach()).cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def hash_json(value: Any) -> str:
    """Identity of plain data."""
    return hashlib.sha256(_json(value).encode()).hexdigest()[:32]


def hash_rows(rows: Iterable[Any]) -> str:
    """``hash_json(list(rows))``, of rows that are made one at a time."""
    digest = hashlib.sha256(b"[")
    for number, row in enumerate(rows):
        digest.update((", " * bool(number) + _json(row)).encode())
    digest.update(b"]")
    return digest.hexdigest()[:32]


def seed_of(*values: Any) -> int:
    """A seed for random numbers, of 60 bits: other values give unrelated ones."""
    return int(hash_json(values)[:15], 16)


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def hash_file(path: str | Path) -> str:
    """The sha256 of a file, in 64 hex digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(paths: Iterable[Path], root: Path) -> dict[str, str]:
    """Where files lie below ``root`` -> their sha256."""
    return {path.relative_to(root).as_posix(): hash_file(path) for path in paths}


def hash_weight_files(paths: list[Path]) -> str:
    """Identity of large safetensors files: name, size, the whole header and evenly spread samples.

    A sample instead of every byte keeps this at milliseconds for a model of any size; a model that was trained
    on differs nearly everywhere.
    """
    digest = hashlib.sha256()
    for path in sorted(paths):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
            digest.update(file.read(min(header, size)))
            for number in range(CHUNKS_PER_FILE):
                file.seek(number * max(size - CHUNK, 0) // (CHUNKS_PER_FILE - 1))
                digest.update(file.read(CHUNK))
    return digest.hexdigest()[:32]


def differences(
    recorded: Mapping[str, Any], found: Mapping[str, Any], label: str = "trained with"
) -> list[str]:
    """What differs between two nested dicts of plain values, one line per field: "  a.b: <label> 1, found 2"."""
    was, here = flat(recorded), flat(found)
    fields = [field for field in {**was, **here} if was.get(field) != here.get(field)]
    return [f"  {field}: {label} {was.get(field)!r}, found {here.get(field)!r}" for field in fields]


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, of the paths "a.b"."""
    out: dict[str, Any] = {}
    for key, item in value.items():
        out |= flat(item, f"{prefix}{key}.") if isinstance(item, Mapping) else {f"{prefix}{key}": item}
    return out

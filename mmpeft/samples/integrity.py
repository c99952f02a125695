"""What `prepare` made: how large, with which hash, and whether it is still so."""

import hashlib
from pathlib import Path

from mmpeft.hashing import hash_file
from mmpeft.paths import size_damage


def fingerprint(path: Path) -> dict[str, int | str]:
    """Bytes and sha256 of a file, or of all files of a folder taken together with their names."""
    if path.is_file():
        return {"bytes": path.stat().st_size, "sha256": hash_file(path)}
    digest, size = hashlib.sha256(), 0
    for file in sorted(path.rglob("*")):
        if file.is_file():
            data = file.read_bytes()
            digest.update(f"{file.relative_to(path).as_posix()}\0{len(data)}\0".encode() + data)
            size += len(data)
    return {"bytes": size, "sha256": digest.hexdigest()}


def damage(folder: Path, files: dict) -> str:
    """The first file that is missing or not as it was recorded, in words; else ""."""
    changed = (name for name, wanted in files.items() if fingerprint(folder / name) != wanted)
    return size_damage(folder, files) or next((f"the content of {name} has changed" for name in changed), "")

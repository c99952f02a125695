"""What `prepare` made: how large, with which hash, and whether it is still so."""

import hashlib
import json
import os
from pathlib import Path

from mmpeft.paths import size_damage


def write_manifest(root: Path, manifest: dict) -> None:
    """Replaces the manifest in one step."""
    unfinished = root / ".manifest.json"
    unfinished.write_text(json.dumps(manifest, indent=2) + "\n")
    os.replace(unfinished, root / "manifest.json")


def fingerprint(path: Path) -> dict[str, int | str]:
    """Bytes and sha256 of a file, or of all files of a folder taken together with their names."""
    if path.is_file():
        with path.open("rb") as file:
            return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
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

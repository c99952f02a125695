"""What `prepare` made, from what, how large, with which hash."""

import hashlib
import json
import os
from pathlib import Path


def read_manifest(root: Path) -> dict:
    """The manifest, or an empty one where it is missing or unreadable (every part is then made again)."""
    try:
        return json.loads((root / "manifest.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


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


def damage(folder: Path, files: dict, content: bool) -> str:
    """The first file that is missing or of another size (or `content`) than recorded, in words; else ""."""
    for name, wanted in files.items():
        path = folder / name
        if not path.exists():
            return f"{name} is missing"
        if path.is_file() and path.stat().st_size != wanted["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, wanted {wanted['bytes']}"
        if content and fingerprint(path) != wanted:
            return f"the content of {name} has changed"
    return ""

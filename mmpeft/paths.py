"""Where things lie on this machine: the home of mmpeft, and `embedded/...` names as paths."""

import json
import os
from difflib import get_close_matches
from pathlib import Path

from mmpeft.errors import MissingFileError

LANGUAGE_MODEL = "embedded/smollm2-135m-instruct"
VISION_WEIGHTS = "embedded/efficientnet-lite0/model.safetensors"

EMBEDDED = (
    *("smollm2-135m-instruct", "efficientnet-lite0", "easy-vqa", "digits", "photos", "easy-vqa-shapes"),
    *("easy-vqa-german", "docstrings", "modules", "manual", "facts"),
)
"""What `mmpeft prepare` makes, so that a misspelt name can be told before it has run."""


def home() -> Path:
    """The folder that holds `embedded/` and caches: $MMPEFT_HOME, else `mmpeft` in the user's cache folder."""
    if chosen := os.environ.get("MMPEFT_HOME"):
        return Path(chosen).expanduser().absolute()
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache).expanduser().absolute() / "mmpeft"


def resolve(name: str | Path) -> str:
    """The path of an `embedded/...` name; any other name (a hub id, a path) comes back unchanged.

    Raises:
        MissingFileError: the name is not there, or has another size than `mmpeft prepare` gave it.
    """
    name = str(name)
    if not name.startswith("embedded/"):
        return name
    path = home() / name
    if not path.exists():
        near = get_close_matches(name, _known_names(), n=1, cutoff=0.4)
        hint = f"; closest name: {near[0]!r}" if near and near[0] != name else ""
        raise MissingFileError(f"{name!r} is not at {path}{hint}. Run `mmpeft prepare` to make it.")
    part = name.split("/")[1]
    files = read_manifest(home() / "embedded").get(part, {}).get("files", {})
    if reason := size_damage(home() / "embedded" / part, files):
        raise MissingFileError(f"{name!r} is damaged ({reason}). Run `mmpeft prepare` to rebuild it.")
    return str(path)


def read_manifest(root: Path) -> dict:
    """What `mmpeft prepare` recorded; empty where that is missing or unreadable (every part is then made again)."""
    try:
        return json.loads((root / "manifest.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def size_damage(folder: Path, files: dict) -> str:
    """The first file that is missing or of another size than recorded, in words; else ""."""
    for name, wanted in files.items():
        path = folder / name
        if not path.exists():
            return f"{name} is missing"
        if path.is_file() and path.stat().st_size != wanted["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, wanted {wanted['bytes']}"
    return ""


def _known_names() -> list[str]:
    folders = [home() / "embedded" / name for name in EMBEDDED]
    files = [path for folder in folders if folder.is_dir() for path in folder.iterdir()]
    return [path.relative_to(home()).as_posix() for path in folders + files]

"""Where the embedded folders lie."""

import os
from difflib import get_close_matches
from pathlib import Path

from mmpeft.embedded import catalogue
from mmpeft.embedded.manifest import damage, read_manifest

LANGUAGE_MODEL = "embedded/smollm2-135m-instruct"
VISION_WEIGHTS = "embedded/efficientnet-lite0/model.safetensors"
DATA = "embedded/easy-vqa"


def home() -> Path:
    """The folder that holds `embedded/`: $MMPEFT_HOME, else `mmpeft` in the user's cache folder."""
    if chosen := os.environ.get("MMPEFT_HOME"):
        return Path(chosen).expanduser().absolute()
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache).expanduser().absolute() / "mmpeft"


def resolve(name: str | Path) -> str:
    """The path of an `embedded/...` name; any other name (a hub id, a path) comes back unchanged.

    Raises:
        FileNotFoundError: the name is not there, or has another size than `prepare` gave it.
    """
    name = str(name)
    if not name.startswith("embedded/"):
        return name
    path = home() / name
    if not path.exists():
        near = get_close_matches(name, _known_names(), n=1, cutoff=0.4)
        hint = f"; closest name: {near[0]!r}" if near else ""
        raise FileNotFoundError(f"{name!r} is not at {path}{hint}. Run `mmpeft prepare` to make it.")
    part = name.split("/")[1]
    files = read_manifest(home() / "embedded").get(part, {}).get("files", {})
    if reason := damage(home() / "embedded" / part, files, content=False):
        raise FileNotFoundError(f"{name!r} is damaged ({reason}). Run `mmpeft prepare` to rebuild it.")
    return str(path)


def _known_names() -> list[str]:
    folders = [home() / "embedded" / part.name for part in catalogue.PARTS]
    files = [path for folder in folders if folder.is_dir() for path in folder.iterdir()]
    return [path.relative_to(home()).as_posix() for path in folders + files]

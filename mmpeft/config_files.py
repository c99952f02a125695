"""The configs that come with mmpeft: listed, and copied to where people change them."""

import re
import shutil
from itertools import takewhile
from pathlib import Path

from mmpeft.errors import RefusedError

INSTALLED = Path(__file__).parent / "configs"
"""Where a wheel has them; a checkout has them beside the package."""


def config_folder() -> Path:
    """The folder of all configs."""
    return INSTALLED if INSTALLED.is_dir() else Path(__file__).parents[1] / "configs"


def list_configs() -> list[tuple[str, str]]:
    """(path as in the docs, what it is) of every config."""
    folder = config_folder()
    return [
        (f"configs/{path.relative_to(folder)}", _purpose(path)) for path in sorted(folder.rglob("*.yaml"))
    ]


def copy_configs(target: str | Path) -> list[Path]:
    """Copies all configs into a folder; those that are there already are kept.

    Returns:
        What was copied.

    Raises:
        RefusedError: the folder is a file.
    """
    target, copied = Path(target), []
    if target.exists() and not target.is_dir():
        raise RefusedError(f"{target} is a file; wanted a folder for the configs")
    for source in sorted(config_folder().rglob("*.yaml")):
        path = target / source.relative_to(config_folder())
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, path)
            copied.append(path)
    return copied


def _purpose(path: Path) -> str:
    """The first sentence of its comment, after the line with the command."""
    comment = takewhile(lambda line: line.startswith("#"), path.read_text().splitlines()[1:])
    return re.split(r"(?<=\.) (?=[A-Z])", " ".join(line.removeprefix("#").strip() for line in comment))[0]

"""The configs that come with mmpeft: listed, copied to where people change them, and put over others as presets."""

import re
import shutil
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from typing import Any

from mmpeft.errors import RefusedError

INSTALLED = Path(__file__).parent / "configs"
"""Where a wheel has them; a checkout has them beside the package."""
PRESETS = "presets"
"""Among them, the folder of what is put over a config."""
PRESET_HELP = "settings that are put over --config: a name of configs/presets/ in `mmpeft configs list`"


def config_folder() -> Path:
    """The folder of all configs."""
    return INSTALLED if INSTALLED.is_dir() else Path(__file__).parents[1] / "configs"


def list_configs() -> list[tuple[str, str]]:
    """(path as in the docs, what it is) of every config."""
    folder = config_folder()
    return [
        (f"configs/{path.relative_to(folder)}", _purpose(path)) for path in sorted(folder.rglob("*.yaml"))
    ]


def with_presets(arguments: list[str]) -> list[str]:
    """The words with ``--config FILE`` in place of every ``--preset NAME``, behind all configs: what is given after
    a preset goes over it, another config does not.

    Raises:
        RefusedError: there is no such preset; or a run's own config is wanted.
    """
    words, found, rest = [], [], [*arguments]
    configured = 0
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if name == "--preset":
            found.append((len(words), _preset_file(value if equals else "".join(rest[:1]))))
            del rest[: not equals]
            continue
        words.append(name + equals + value)
        if name in ("-c", "--config"):
            words += rest[: not equals]
            del rest[: not equals]
            configured = len(words)
    if found and any(word.partition("=")[0] == "--run" for word in words):
        raise RefusedError(
            "--preset is put over a config, and --run goes on with what a run was trained with: leave one of them out. "
            "For another fit with the run's settings give --config RUN/config.yaml and --trainer.default_root_dir"
        )
    for place, path in reversed(found):
        place = max(place, configured)
        words[place:place] = ["--config", str(path)]
    return words


def refuse_key(value: Any) -> Any:
    """Of the parser, which finds no `--preset` any more.

    Raises:
        RefusedError: it stands in a config.
    """
    raise RefusedError(f"preset: {value} stands in a config; it is an option of the command line, --preset")


def presets() -> dict[str, Path]:
    """Name -> file of every preset."""
    return {path.stem: path for path in sorted((config_folder() / PRESETS).glob("*.yaml"))}


def _preset_file(name: str) -> Path:
    known = presets()
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f"; the closest is {near[0]!r}" if near else ""
        raise RefusedError(f"--preset: there is no {name!r}{hint}. There are: {', '.join(known)}")
    return known[name]


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


def comment_of(path: Path) -> str:
    """What is said of a config in its comment, after the line with the command."""
    comment = takewhile(lambda line: line.startswith("#"), path.read_text().splitlines()[1:])
    return " ".join(line.removeprefix("#").strip() for line in comment)


def _purpose(path: Path) -> str:
    """The first sentence of its comment."""
    return re.split(r"(?<=\.) (?=[A-Z])", comment_of(path))[0]

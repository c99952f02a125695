"""``data.cache`` is a folder or a section. A key of the section, given over a folder, would take its place unsaid."""

from itertools import pairwise
from pathlib import Path

import yaml

SECTION, KEY = "--data.cache", "folder"


def with_sections(arguments: list[str]) -> list[str]:
    """The words with ``--data.cache.folder`` before the first other key of the section, where a folder alone is given
    before it, in a config or by ``--data.cache``."""
    first = next((n for n, word in enumerate(arguments) if word.startswith(f"{SECTION}.")), None)
    if first is None:
        return arguments
    folder: str | None = None
    for word, following in pairwise(arguments[: first + 1]):
        option, equals, value = word.partition("=")
        value = value if equals else following
        if option in ("-c", "--config"):
            folder = _in_config(value) or folder
        elif option == SECTION:
            folder = _folder(value)
    return [*arguments[:first], *([f"{SECTION}.{KEY}={folder}"] if folder else []), *arguments[first:]]


def _in_config(path: str) -> str | None:
    """What cannot be read is refused by the parser, in its own words."""
    try:
        config = yaml.safe_load(Path(path).read_text())
        setting = config["data"]["cache"]
    except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError):
        return None
    return setting if isinstance(setting, str) else None


def _folder(value: str) -> str | None:
    """The value of the option, where it is no section."""
    try:
        setting = yaml.safe_load(value)
    except yaml.YAMLError:
        return value
    return setting if isinstance(setting, str) else None

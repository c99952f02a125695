"""Config files that cannot be read, told with their name before anything is parsed of them."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import yaml

from mmpeft.errors import RefusedError


def check_config_files(arguments: Sequence[str]) -> None:
    """Looks at the files of ``--config`` among a command's arguments; a file that is not there is the parser's to tell.

    Raises:
        RefusedError: one is not UTF-8, no YAML, or no mapping of settings.
    """
    named = [word.removeprefix("--config=") for word in arguments if word.startswith("--config=")]
    named += [path for word, path in pairwise(arguments) if word in ("-c", "--config")]
    for path in map(Path, named):
        if path.is_file():
            _check(path)


def _check(path: Path) -> None:
    try:
        settings = yaml.safe_load(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise RefusedError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise RefusedError(
            f"{path}{line}: not valid YAML: {getattr(error, 'problem', None) or error}"
        ) from None
    if not isinstance(settings, dict):
        found = "nothing" if settings is None else f"a {type(settings).__name__}"
        raise RefusedError(
            f"{path} holds {found}; wanted settings, such as model: and data: with theirs below"
        )

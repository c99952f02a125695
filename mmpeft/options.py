"""Command lines: one to paste, and one that cannot be parsed, told in a line or two: the option, the closest there
is, and where help is."""

import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from mmpeft.errors import refusal_in

UNKNOWN = re.compile(
    r"unrecognized arguments: (?P<words>.+)|(?:does not accept option|^Option) '(?P<key>[^']+)'(?: is not accepted)?$",
    re.S,
)
"""The parsers' own words for an option that they do not have, on the command line and in a config."""


MMPEFT = ("-c", "from mmpeft.cli import main; main()")
"""Arguments of Python that start `mmpeft`."""


def command_line(*words: object) -> str:
    """A command of ours that can be pasted into a shell, whatever is in its paths."""
    return shlex.join(["mmpeft", *map(str, words)])


class TellsBriefly:
    """Mixed into a parser, in place of its usage, which is a hundred lines where every setting is an option."""

    prog: str
    groups: dict[str, Any]
    _option_string_actions: dict[str, Any]
    _inner_parser: bool = False
    """Whether it parses the settings of one class within a config; the class is then its group."""
    parse_known_args: Any

    def parse_beside(self, arguments: list[str], sections: Sequence[str]) -> tuple[Any, list[str]]:
        """Own options, and the words that set something in these sections of a config; no other word is passed on."""
        own, rest = self.parse_known_args(arguments)
        settings = tuple(f"--{section}" for section in sections)
        if foreign := [word for word in rest if word.startswith("--") and not word.startswith(settings)]:
            self.error(f"unrecognized arguments: {' '.join(foreign)}")
        return own, rest

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Ends the program with exit code 2, as every parser does."""
        if refused := refusal_in(ex):
            raise refused from None
        own = getattr(ex, "subcommand_parser", None) or self
        if self._inner_parser and (found := UNKNOWN.search(message)) and found["key"]:
            told = unknown_setting(next(iter(self.groups), "it"), found["key"], own._option_string_actions)
            sys.stderr.write(f"error: {told}\n")
            sys.exit(2)
        command = own.prog.replace(" [options]", "")
        told = unknown_option(message, own._option_string_actions) or message
        sys.stderr.write(f"error: {told}\n`{command} --help` lists the options\n")
        sys.exit(2)


def unknown_option(message: str, known: Iterable[str]) -> str | None:
    """What is told instead of a parser's ``message``; None where that is about something else."""
    found = UNKNOWN.search(message)
    if found is None:
        return None
    words = [f"--{found['key']}"] if found["key"] else found["words"].split()
    option = next((word.split("=")[0] for word in words if word.startswith("-")), None)
    if option is None:
        return f"{' '.join(words)!r} is one argument too many; text of several words stands in quotes"
    near = get_close_matches(option.replace("-", "_"), spelt := {o.replace("-", "_"): o for o in known}, n=1)
    return f"there is no option {option}" + (f"; the closest is {spelt[near[0]]}" if near else "")


def unknown_setting(kind: str, key: str, known: Iterable[str]) -> str:
    """What is told of a key that a class of a config does not have."""
    names = [option.removeprefix("--") for option in known]
    names = [name for name in names if name[0] != "-" and name[-1] != "+" and name != "help"]
    near = get_close_matches(key, names, n=1)
    closest = f"the closest is {near[0]!r}; " if near else ""
    settings = ", ".join(names) or "none: those of a class stand in init_args"
    return f"{kind} has no setting {key!r}; {closest}it has {settings}"

"""Runs cases: one JSON line per run with medians and ratios, and on wish their tables in docs/benchmarks.md.

    python -m benchmarks                                   # the cases
    python -m benchmarks adapter_step decoding --repeats 9
    python -m benchmarks easy_vqa --json rows.jsonl --write

A case's own options, which `python -m benchmarks CASE --help` shows, may follow.
"""

import inspect
import shlex
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

import mmpeft  # noqa: F401, before torch: it says how OpenMP's threads wait
from benchmarks.race import case_function, case_names, measure, report, what
from benchmarks.table import DOCUMENT, write_table
from mmpeft.training.malloc import keep_freed_memory


def main(words: list[str]) -> None:
    """Entry point."""
    cases = list(takewhile(lambda word: not word.startswith("-"), words))
    if unknown := [name for name in cases if name not in case_names()]:
        sys.exit(f"there is no case {unknown[0]!r}; there are {', '.join(case_names())}")
    own, rest = _parser(cases).parse_known_args(words[len(cases) :])
    options = _pairs(rest)
    functions = {name: case_function(name) for name in cases}
    known = {name: inspect.signature(function).parameters for name, function in functions.items()}
    for option in options:
        if cases and not any(option in parameters for parameters in known.values()):
            sys.exit(f"--{option} is an option of none of {', '.join(cases)}; see --help")
    if own.help or not cases:
        _parser(cases).print_help()
        for name, function in functions.items():
            print(_case_help(name, function))
        return
    _check(own)
    keep_freed_memory()
    measured = False
    for name, function in functions.items():
        given = [f"--{option}={value}" for option, value in options.items() if option in known[name]]
        races = auto_cli(function, args=given, as_positional=False) if known[name] else function()
        command, rows = shlex.join(["python", "-m", "benchmarks", name, *_repeats(own.repeats), *given]), []
        for race in races:
            for row in measure(race, own.repeats, own.only):
                rows.append({"case": name} | row)
                report(rows[-1], own.json)
            if own.write:
                write_table(name, what(name), command, rows)
        measured |= bool(rows)
    if not measured:
        sys.exit(f"no run of {', '.join(cases)} has {own.only!r} in its name")


def _parser(cases: list[str]) -> ArgumentParser:
    lines = [f"  {name:<16} {what(name).splitlines()[0]}" for name in ([] if cases else case_names())]
    parser = ArgumentParser(
        "python -m benchmarks",
        usage="python -m benchmarks CASE... [options]",
        description="\n".join([(__doc__ or "").splitlines()[0], *(["", "cases:", *lines] if lines else [])]),
        formatter_class=RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("--repeats", type=int, help="rounds over all runs; 0 is the warm-up alone")
    parser.add_argument("--only", default="", help="the runs that have this in their names")
    parser.add_argument("--json", metavar="FILE", help="append the lines to this file too")
    parser.add_argument("--write", action="store_true", help=f"put the tables into {DOCUMENT}")
    parser.add_argument("-h", "--help", action="store_true", help="this, and the cases' own options")
    return parser


def _check(own: Namespace) -> None:
    """What is wrong with the command is told before anything is measured."""
    if own.repeats is not None and own.repeats < 0:
        sys.exit(f"--repeats is {own.repeats}; it is 0, which is the warm-up alone, or more")
    if own.only and own.write:
        sys.exit("--only leaves runs out, which the table in the document has: leave out --only, or --write")
    if own.json is not None:
        try:
            Path(own.json).open("a").close()
        except OSError as error:
            sys.exit(f"--json: lines cannot be appended to {own.json}: {error.strerror}")


def _pairs(words: list[str]) -> dict[str, str]:
    """``--key value`` and ``--key=value``."""
    pairs, rest = {}, [*words]
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if name in case_names():
            sys.exit(f"{name} stands behind an option; cases come first")
        if not name.startswith("--") or not (equals or rest):
            sys.exit(f"{name!r} is no option with a value")
        pairs[name.removeprefix("--")] = value if equals else rest.pop(0)
    return pairs


def _case_help(name: str, function: Callable[..., Any]) -> str:
    options = "".join(f"\n  --{own}" for own in inspect.signature(function).parameters.values())
    return f"\n{name}: {what(name)}\n\n{inspect.getdoc(function)}\n{options}"


def _repeats(repeats: int | None) -> list[str]:
    return [] if repeats is None else ["--repeats", str(repeats)]


if __name__ == "__main__":
    main(sys.argv[1:])

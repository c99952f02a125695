"""The plan of a continual experiment: which phases train what after which, and what is measured after each."""

import re
from argparse import ArgumentError
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from mmpeft.errors import MissingFileError, RefusedError
from mmpeft.experiments.steps import Settings, merged, read_settings

BEFORE = "before"
"""In place of a phase: nothing has been trained yet."""
MEASURED = "measured"
"""Folder of the measurements."""
NAME = re.compile(r"[A-Za-z0-9][\w-]*")


@dataclass
class Phase:
    """One `mmpeft fit`."""

    config: str
    """YAML of the run."""
    after: str | None = None
    """The phase whose run it begins from; the first phase begins from its own model.start_from, or the base."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What is to be different from the config, nested as there."""


@dataclass
class DataSet:
    """Questions that are answered after every phase."""

    test: str
    """Data file, as data.test."""
    learnt_in: str | None = None
    """The phase that teaches them, after which they should stay right: what is lost later is forgetting."""
    limit: int | None = None
    """Only so many of the questions."""


@dataclass
class Plan:
    """Phases and what is measured after each.

    Raises:
        RefusedError: a name cannot be a folder's, or a phase is named that is not there.
    """

    output: str
    """Folder for the runs and results."""
    phases: dict[str, Phase]
    """By name, every phase below the one it comes after; the first comes after none."""
    measure: dict[str, DataSet]
    """By name."""

    def __post_init__(self) -> None:
        if not self.phases or not self.measure:
            raise RefusedError("found no phases or nothing to measure; wanted at least one of each")
        for name in (*self.phases, *self.measure):
            if not NAME.fullmatch(name) or name in (BEFORE, MEASURED):
                raise RefusedError(
                    f"{name!r} is to be a folder: wanted letters, digits, _ and -, but not {BEFORE} or {MEASURED}"
                )
        for number, (name, phase) in enumerate(self.phases.items()):
            above = list(self.phases)[:number]
            if phase.after not in (above or [None]):
                wanted = f"one of those above it: {', '.join(above)}" if above else "none, as it is the first"
                raise RefusedError(f"phase {name!r} comes after {phase.after!r}; wanted {wanted}")
        for name, data in self.measure.items():
            if data.learnt_in not in (None, *self.phases):
                raise RefusedError(
                    f"{name!r} is learnt in {data.learnt_in!r}; wanted one of {', '.join(self.phases)}"
                )

    def chain(self, phase: str) -> list[str]:
        """The phases up to this one, the first one first."""
        before = self.phases[phase].after
        return [*(self.chain(before) if before else []), phase]


def read_plan(path: str) -> Plan:
    """Raises:
    RefusedError: the file is no plan; the message names the file and the key.
    """
    if not Path(path).is_file():
        raise MissingFileError(f"{path} is no plan: there is no such file")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Plan)
    try:
        return Plan(**vars(parser.instantiate(parser.parse_path(path))))
    except (ArgumentError, RefusedError) as error:
        raise RefusedError(f"{path} is no plan: {error}; `mmpeft continual --help` shows one") from None


def fit_settings(plan: Plan, name: str) -> Settings:
    """The settings that a phase is trained with."""
    phase = plan.phases[name]
    own: dict[str, Any] = {"trainer": {"default_root_dir": f"{plan.output}/{name}"}}
    if phase.after:
        own["model"] = {"start_from": f"{plan.output}/{phase.after}"}
    return merged(merged(read_settings(phase.config), phase.settings), own)


def finetunes_after(plan: Plan, name: str, settings: dict[str, Settings]) -> dict[str, str]:
    """Finetune -> the phase that trained it last, of those that are there after a phase.

    Raises:
        RefusedError: a phase trains no finetune, or moves the projector that another finetune needs.
    """
    found: dict[str, str] = {}
    for phase in plan.chain(name):
        model = settings[phase]["model"]
        if not model.get("adapter"):
            raise RefusedError(
                f"phase {phase!r} ({plan.phases[phase].config}) has no model.adapter; wanted a finetune. Train "
                "projectors before, and give their run to the first phase as model.start_from"
            )
        found[model.get("adapter_name", "default")] = phase
        moves = model.get("vision", {}) is not None and model.get("train_projector", True)
        if len(found) > 1 and moves:
            raise RefusedError(
                f"phase {phase!r} trains the projector that {', '.join(found)} share, so the others would answer "
                "otherwise than before; set model.train_projector to false in its settings"
            )
    return found

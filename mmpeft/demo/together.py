"""Runs that are asked beside each other: what they must have in common, and what their finetunes are called."""

import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mmpeft.data.template import current_settings
from mmpeft.errors import RefusedError
from mmpeft.hashing import differences
from mmpeft.models.language import LanguageConfig
from mmpeft.models.vision_config import VisionConfig
from mmpeft.names import RESERVED_NAME
from mmpeft.runs.manifest import Manifest, read_manifest


def shown_name(run: Path, own: str, among: Sequence[str]) -> str:
    """What the page calls a finetune where there are several runs: by its run's folder."""
    folder = run.resolve().name
    name = folder if len(among) == 1 and folder != RESERVED_NAME else f"{folder}.{own}"
    return re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip(".")


def refuse_same_names(runs: Sequence[tuple[Path, Manifest]]) -> None:
    """Raises:
    RefusedError: two finetunes of runs would be called alike, on the page or by the engine, which the first run's
        finetunes are in under their own names.
    """
    seen = {RESERVED_NAME, *runs[0][1].adapters}
    for number, (run, manifest) in enumerate(runs):
        names = {shown_name(run, own, manifest.adapters) for own in manifest.adapters}
        if number and (again := seen & names):
            raise RefusedError(
                f"{run}: there is a finetune {min(again)!r} already; rename the folder of one of the runs"
            )
        seen |= names


def checked_manifest(run: Path, first: Manifest) -> Manifest:
    """The manifest of a run that is to be asked beside the first.

    Raises:
        RefusedError: its finetunes would read or see something else there than they were trained on.
    """
    manifest = read_manifest(run)
    if lines := differences(_reading(manifest), _reading(first), label="is"):
        raise RefusedError(
            f"{run} cannot be asked beside the first run, which reads otherwise; open it in a page of its own:\n"
            + "\n".join(lines)
        )
    if manifest.format == 1 and manifest.vision:
        raise RefusedError(
            f"{run} is of an older format, whose projectors lie in one file: name it as the first run"
        )
    return manifest


def _reading(manifest: Manifest) -> dict[str, Any]:
    """How a run reads texts and images, beside what its identity says; settings that are younger than it as they are
    by default."""
    template = {k: v for k, v in current_settings(manifest.template).items() if k != "max_length"}
    language = vars(LanguageConfig(**manifest.language)) | {"name": None}
    vision = (
        asdict(VisionConfig(**manifest.vision)) | {"name": None, "weights": None} if manifest.vision else {}
    )
    return {"template": template, "language": language, "vision": vision}


def renamed(manifest: Manifest, names: dict[str, str]) -> Manifest:
    """With the finetunes as the engine calls them."""
    return replace(
        manifest,
        adapters=[*names.values()],
        choices={names[own]: known for own, known in manifest.choices.items() if own in names},
        without_images=[names[own] for own in manifest.without_images if own in names],
    )

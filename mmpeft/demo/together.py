"""Runs that are asked beside each other: what they must have in common, and what their finetunes are called."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmpeft.data.template import current_settings
from mmpeft.errors import RefusedError
from mmpeft.hashing import differences
from mmpeft.names import RESERVED_NAME
from mmpeft.runs.manifest import Manifest, read_manifest


def shown_name(run: Path, own: str, among: Sequence[str]) -> str:
    """What the page calls a finetune where there are several runs: by its run's folder."""
    folder = run.resolve().name
    name = folder if len(among) == 1 and folder != RESERVED_NAME else f"{folder}.{own}"
    return re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip(".")


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
    """How a run reads texts and images, beside what its identity says."""
    template = {k: v for k, v in current_settings(manifest.template).items() if k != "max_length"}
    language = {k: v for k, v in manifest.language.items() if k != "name"}
    vision = {k: v for k, v in (manifest.vision or {}).items() if k not in ("name", "weights")}
    return {"template": template, "language": language, "vision": vision}


def renamed(manifest: Manifest, names: dict[str, str]) -> Manifest:
    """With the finetunes as the engine calls them."""
    return replace(
        manifest,
        adapters=[*names.values()],
        choices={names[own]: known for own, known in manifest.choices.items() if own in names},
        without_images=[names[own] for own in manifest.without_images if own in names],
    )

"""Captions a folder of images, resumed where it stopped: `mmpeft caption photos --run runs/caption`.

One JSON row per image, appended batch by batch. Killed at any moment, the same command goes on where it stopped, and
the finished file is the one that an uninterrupted run writes: an unfinished last line is cut off, and batches always
hold the same images. The libraries come in only once there is something to caption.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from mmpeft.data.images import ImageWorker, is_image_file
from mmpeft.data.records import CAPTION_TASK
from mmpeft.errors import MissingFileError, RefusedError, require_positive
from mmpeft.files import append, read_json, write_json
from mmpeft.hashing import hash_file, hash_json, hash_rows
from mmpeft.progress_bar import progress_bar
from mmpeft.runs.layout import adapter_folder
from mmpeft.runs.manifest import Manifest, read_manifest

if TYPE_CHECKING:
    from mmpeft.inference.requests import Completion
    from mmpeft.inference.vlm import VisionLanguageModel


def caption_folder(
    folder: str,
    run: str = "runs/quickstart",
    output: str = "captions.jsonl",
    adapter: str | None = None,
    batch_size: int = 32,
    overwrite: bool = False,
) -> int:
    """Captions every image of a folder and of the folders in it; called again, it resumes where it stopped.

    The arguments are those of `mmpeft caption`.

    Returns:
        How many images could not be read.

    Raises:
        RefusedError: an unknown adapter, a folder without images, or an output that belongs to something else.
        Timeout: another process is writing the output.
    """
    require_positive("batch_size", batch_size)
    manifest = read_manifest(run)
    adapter = manifest.finetune(adapter)
    names, left = find_images(folder)
    meta = {"run": _identity(run, manifest, adapter), "adapter": adapter, "images": _hash(folder, names)}
    with FileLock(f"{output}.lock", timeout=0):
        skipped, unreadable = _resume(Path(output), meta, names, overwrite)
        start = time.perf_counter()
        if skipped < len(names):
            from mmpeft.inference.vlm import load

            vlm, named = load(run, batch_size=batch_size), adapter if manifest.adapters else None
            with ImageWorker() as worker:
                vlm.decode_by(worker.load)  # of unknown origin: none may hang
                unreadable += _append(output, vlm, folder, names, skipped, named, batch_size)
    speed = (len(names) - skipped) / (time.perf_counter() - start)
    pace = f", {speed:.1f} images/s" if speed else ""
    if left:
        print(_others(left))
    print(f"{output}: {_outcome(len(names), skipped, unreadable)}{pace}")
    return unreadable


def _outcome(total: int, skipped: int, unreadable: int) -> str:
    """What has become of a folder's images, in words."""
    captioned = f"{total - unreadable} of {total} captioned"
    before = f" ({skipped} rows were there already)" if skipped else ""
    errors = f', {unreadable} error{"s" * (unreadable > 1)} (see the rows with "error")' if unreadable else ""
    return captioned + before + errors


def _others(left: Mapping[str, int]) -> str:
    """The files that are no images, in words."""
    kinds = ", ".join(
        f"{count} {ending or 'without an ending'}"
        for ending, count in sorted(left.items(), key=lambda own: -own[1])
    )
    total = sum(left.values())
    return f"{total} other file{'s' * (total > 1)} of the folder {'were' if total > 1 else 'was'} left out: {kinds}"


def captions_or_errors(
    vlm: "VisionLanguageModel", images: Mapping[str, Path], adapter: str | None = None
) -> "dict[str, Completion]":
    """A caption for every image, or why it has none: one that cannot be read does not fail the others.

    Args:
        images: what each is called, also in its error -> its file.
        adapter: as in `VisionLanguageModel.caption`.
    """
    files = [str(path) for path in images.values()]
    requests, _ = vlm.requests(files, vlm.caption_instruction, adapter, task=CAPTION_TASK)
    found = dict(zip(images, vlm.answer(requests), strict=True))
    for name, completion in found.items():
        if completion.error is not None:
            completion.error = completion.error.replace(str(images[name]), name)
    return found


def find_images(folder: str) -> tuple[list[str], Counter[str]]:
    """The images below a folder, and what else there is. Links to folders are not followed.

    Returns:
        Sorted paths, relative to the folder, of files called as images are, or without an ending and beginning like
        one; and how many others there are of each ending.
    """

    if not Path(folder).is_dir():
        raise MissingFileError(f"{folder} is no folder; name the one that holds the images")

    def fail(error: OSError) -> None:
        raise error  # by default, os.walk passes over a folder that it cannot read

    paths = [Path(parent, name) for parent, _, names in os.walk(folder, onerror=fail) for name in names]
    images = {path for path in paths if is_image_file(path)}
    left = Counter(path.suffix.lower() for path in paths if path not in images)
    if not images:
        raise RefusedError(f"{folder} holds no images" + (f"; {_others(left)}" if left else ""))
    return sorted(path.relative_to(folder).as_posix() for path in images), left


def _append(
    output: str,
    vlm: "VisionLanguageModel",
    folder: str,
    names: Sequence[str],
    done: int,
    adapter: str | None,
    batch_size: int,
) -> int:
    """Writes the rows after the first ``done``; returns how many are errors. Where a run has no finetunes, such as one
    of captions that trained the projector alone, ``adapter`` is None and no row names one: "base" would read as if
    nothing had been trained."""
    unreadable, total = 0, len(names)
    with progress_bar("captioning", "image", total, done) as update:
        while done < total:
            first = done - done % batch_size  # resumed, a batch holds the images that it held before
            own = names[first : first + batch_size]
            answers = captions_or_errors(vlm, {name: Path(folder, name) for name in own}, adapter)
            rows = [_row(*pair, adapter) for pair in answers.items()][done - first :]
            append(Path(output), b"".join(json.dumps(row).encode() + b"\n" for row in rows))
            unreadable += sum("error" in row for row in rows)
            done += len(rows)
            update(len(rows))
    return unreadable


def _row(name: str, answer: "Completion", adapter: str | None) -> dict[str, str]:
    if answer.error is not None:
        return {"image": name, "error": answer.error}
    return {"image": name, "caption": answer.text} | ({"adapter": adapter} if adapter else {})


def _resume(output: Path, meta: dict[str, str], names: list[str], overwrite: bool) -> tuple[int, int]:
    """How many rows the output holds, and how many are errors. Cuts off an unfinished last line."""
    if output.is_dir():
        raise RefusedError(
            f"{output} is a folder; name a file for the captions, such as {output / 'captions.jsonl'}"
        )
    sidecar = Path(f"{output}.meta.json")
    if overwrite:
        output.unlink(missing_ok=True)
    if not output.exists() or not output.stat().st_size:
        write_json(sidecar, meta)
        return 0, 0
    known = read_json(sidecar)
    differ = ", ".join(key for key in meta if known.get(key) != meta[key])
    if differ:
        raise RefusedError(f"{output} was made with other {differ}; --overwrite it, or name another --output")
    with output.open("r+b") as file:
        lines = [line for line in file if line.endswith(b"\n")]
        file.truncate(sum(map(len, lines)))
    heads = [f'{{"image": {json.dumps(name)}, '.encode() for name in names]
    if len(lines) > len(names) or not all(map(bytes.startswith, lines, heads)):
        raise RefusedError(f"{output} was edited: its rows are not the folder's first images, in order")
    return len(lines), sum(b', "error": ' in line for line in lines)  # a caption's own quotes are escaped


def _identity(run: str, manifest: Manifest, adapter: str) -> str:
    """What decides about a run's captions; not its metrics and facts, which a later test changes."""
    files = sorted(adapter_folder(run, adapter).rglob("adapter_*"))
    projector = manifest.projectors.get(adapter, manifest.projector)
    how = [manifest.vision, manifest.template, manifest.instructions, manifest.max_new_tokens]
    if manifest.choices:
        how.append(manifest.choices.get(adapter))
    return hash_json([manifest.identity, *how, projector, [hash_file(path) for path in files]])


def _hash(folder: str, names: list[str]) -> str:
    """Names and content of the images, wherever a copy of the folder lies; what cannot be read has none."""
    return hash_rows([name, _content(Path(folder, name))] for name in names)


def _content(path: Path) -> str | None:
    try:
        return hash_file(path) if path.is_file() else None  # to open a pipe waits for ever
    except OSError:
        return None

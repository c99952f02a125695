"""Captions a folder of images: `mmpeft caption photos --run runs/caption`.

One JSON row per image, in the order of the sorted paths, appended batch by batch::

    {"image": "2024/cat.jpg", "caption": "a cat on a sofa", "adapter": "default"}
    {"image": "2024/cut.jpg", "error": "'2024/cut.jpg': cannot be decoded (...)"}

Killed at any moment, the same command goes on where it stopped, and the finished file is the one that an
uninterrupted run writes: an unfinished last line is cut off, and batches always hold the same images.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from filelock import FileLock
from tqdm.auto import tqdm

from mmpeft.adapters.bank import RESERVED_NAME
from mmpeft.data.images import ImageError, load_image, read_bytes
from mmpeft.errors import RefusedError
from mmpeft.hashing import hash_json
from mmpeft.inference.vlm import VisionLanguageModel, load
from mmpeft.runs.files import PROJECTOR
from mmpeft.runs.manifest import Manifest, read_manifest

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
T = TypeVar("T")


def caption_folder(
    folder: str,
    run: str = "runs/quickstart",
    output: str = "captions.jsonl",
    adapter: str | None = None,
    batch_size: int = 32,
    overwrite: bool = False,
) -> int:
    """Captions every image of a folder and of the folders in it; called again, it resumes where it stopped.

    Args:
        folder: folder of images.
        run: directory that `mmpeft fit` wrote.
        output: file of JSON lines to write or go on with; <output>.meta.json says what it belongs to.
        adapter: a finetune of the run, or "base" for the frozen model; the run's first by default.
        batch_size: images captioned together; may change when going on.
        overwrite: start again instead of going on.

    Returns:
        How many images could not be read.

    Raises:
        RefusedError: an unknown adapter, a folder without images, or an output that belongs to something else.
        Timeout: another process is writing the output.
    """
    manifest = read_manifest(run)
    adapters = [*manifest.adapters, RESERVED_NAME]
    adapter = adapter or adapters[0]
    if adapter not in adapters or batch_size < 1:
        raise RefusedError(f"adapter {adapter!r} is none of {adapters}, or batch_size {batch_size} below 1")
    names = find_images(folder)
    meta = {"run": _identity(run, manifest, adapter), "adapter": adapter, "images": _hash(folder, names)}
    with FileLock(f"{output}.lock", timeout=0):
        skipped, unreadable = _resume(Path(output), meta, names, overwrite)
        start = time.perf_counter()
        if skipped < len(names):
            unreadable += _append(output, load(run), folder, names, skipped, adapter, batch_size)
    done = len(names) - skipped
    speed = done / (time.perf_counter() - start)
    print(f"{output}: {done} done, {skipped} skipped, {unreadable} errors, {speed:.1f} images/s")
    return unreadable


def captions_or_errors(
    vlm: VisionLanguageModel, images: Mapping[str, Path], adapter: str | None = None
) -> dict[str, str | ImageError]:
    """A caption for every image, or why it has none: one that cannot be read does not fail the others.

    Every image is decoded once, by the encoder; only those beside a damaged one again, to find it.

    Args:
        vlm: the model; it takes all images as one batch.
        images: what each is called, also in its error -> its file.
        adapter: as in `VisionLanguageModel.caption`.
    """
    vlm.batch_size = max(1, len(images))
    data, errors = _readable(images, lambda name: read_bytes(images[name]))
    try:  # with the files' bytes: a batch of large decoded images would take gigabytes
        captions = vlm.caption(list(data.values()), adapter) if data else []
    except ImageError:
        intact, damaged = _readable(data, lambda name: load_image(data[name], source=repr(name)).size)
        errors |= damaged
        captions = vlm.caption([data[name] for name in intact], adapter) if intact else []
    answers = iter(captions)
    return {name: errors[name] if name in errors else next(answers) for name in images}


def _readable(names: Iterable[str], read: Callable[[str], T]) -> tuple[dict[str, T], dict[str, ImageError]]:
    """What ``read`` gives for each name, and the errors of the others."""
    found: dict[str, T] = {}
    errors: dict[str, ImageError] = {}
    for name in names:
        try:
            found[name] = read(name)
        except ImageError as error:
            errors[name] = error
    return found, errors


def find_images(folder: str) -> list[str]:
    """Sorted paths of the image files below a folder, relative to it. Links to folders are not followed."""

    def fail(error: OSError) -> None:
        raise error  # by default, os.walk passes over a folder that it cannot read

    paths = [Path(parent, name) for parent, _, names in os.walk(folder, onerror=fail) for name in names]
    images = sorted(path.relative_to(folder).as_posix() for path in paths if path.suffix.lower() in ENDINGS)
    if not images:
        raise RefusedError(f"{folder} holds no images ({', '.join(ENDINGS)})")
    return images


def _append(
    output: str,
    vlm: VisionLanguageModel,
    folder: str,
    names: Sequence[str],
    done: int,
    adapter: str,
    batch_size: int,
) -> int:
    """Writes the rows after the first ``done``; returns how many are errors."""
    unreadable, total = 0, len(names)
    with Path(output).open("ab") as file, tqdm(total=total, initial=done, unit="image") as bar:
        while done < total:
            first = done - done % batch_size  # resumed, a batch holds the images that it held before
            own = names[first : first + batch_size]
            answers = captions_or_errors(vlm, {name: Path(folder, name) for name in own}, adapter)
            rows = [_row(*pair, adapter) for pair in answers.items()][done - first :]
            file.write(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())
            unreadable += sum("error" in row for row in rows)
            done += len(rows)
            bar.update(len(rows))
    return unreadable


def _row(name: str, answer: str | ImageError, adapter: str) -> dict[str, str]:
    if isinstance(answer, ImageError):
        return {"image": name, "error": str(answer)}
    return {"image": name, "caption": answer, "adapter": adapter}


def _resume(output: Path, meta: dict[str, str], names: list[str], overwrite: bool) -> tuple[int, int]:
    """How many rows the output holds, and how many are errors. Cuts off an unfinished last line."""
    sidecar = Path(f"{output}.meta.json")
    if overwrite:
        output.unlink(missing_ok=True)
    if not output.exists() or not output.stat().st_size:
        sidecar.write_text(json.dumps(meta, indent=2) + "\n")
        return 0, 0
    known = json.loads(sidecar.read_text()) if sidecar.is_file() else {}
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
    adapters, own = Path(run, "adapters"), Path(run, "adapters", adapter)
    projectors = [*Path(run).glob(PROJECTOR), *sorted(adapters.glob(f"*/{PROJECTOR}"))]
    files = [*projectors, *sorted(own.rglob("adapter_*"))]
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    return hash_json([manifest.identity, manifest.vision, manifest.template, manifest.instructions, hashes])


def _hash(folder: str, names: list[str]) -> str:
    """Names and sizes of the images; a broken link has none."""
    paths = [Path(folder, name) for name in names]
    return hash_json([names, [path.stat().st_size if path.exists() else None for path in paths]])

"""Captions a folder of images: ``python scripts/caption_images.py photos --run runs/caption``.

One JSON row per image, in the order of the sorted paths, appended batch by batch::

    {"image": "2024/cat.jpg", "caption": "a cat on a sofa", "adapter": "default"}
    {"image": "2024/cut.jpg", "error": "'2024/cut.jpg': cannot be decoded (...)"}

Killed at any moment, the same command goes on where it stopped, and the finished file is the one that an
uninterrupted run writes: an unfinished last line is cut off, and batches always hold the same images.
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from jsonargparse import auto_cli
from tqdm.auto import tqdm

import mmpeft
from mmpeft.data.images import ImageError, load_image, read_bytes
from mmpeft.hashing import hash_json
from mmpeft.runs.files import PROJECTOR
from mmpeft.runs.manifest import Manifest, read_manifest

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def caption_images(
    folder: str,
    run: str = "runs/quickstart",
    output: str = "captions.jsonl",
    adapter: str | None = None,
    batch_size: int = 32,
    overwrite: bool = False,
    strict: bool = False,
) -> None:
    """Captions every image of a folder and of the folders in it; run it again to go on where it stopped.

    Args:
        folder: folder of images.
        run: directory that `mmpeft fit` wrote.
        output: file of JSON lines to write or go on with; <output>.meta.json says what it belongs to.
        adapter: a finetune of the run, or "base" for the frozen model; the run's first by default.
        batch_size: images captioned together; may change when going on.
        overwrite: start again instead of going on.
        strict: exit with code 1 if an image could not be read.
    """
    manifest = read_manifest(run)
    adapters = [*manifest.adapters, "base"]
    adapter = adapter or adapters[0]
    if adapter not in adapters or batch_size < 1:
        raise ValueError(f"adapter {adapter!r} is none of {adapters}, or batch_size {batch_size} below 1")
    names = find_images(folder)
    meta = {"run": _identity(run, manifest, adapter), "adapter": adapter, "images": _hash(folder, names)}
    with FileLock(f"{output}.lock", timeout=0):
        skipped, unreadable = _resume(Path(output), meta, names, overwrite)
        done, total = skipped, len(names)
        vlm = mmpeft.load(run) if done < total else None
        start = time.perf_counter()
        with Path(output).open("ab") as file, tqdm(total=total, initial=done, unit="image") as bar:
            while done < total:
                first = done - done % batch_size
                rows = _caption(vlm, folder, names[first : first + batch_size], adapter)[done - first :]
                file.write(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
                file.flush()
                os.fsync(file.fileno())
                unreadable += sum("error" in row for row in rows)
                done += len(rows)
                bar.update(len(rows))
    speed = (total - skipped) / (time.perf_counter() - start)
    print(f"{output}: {total - skipped} done, {skipped} skipped, {unreadable} errors, {speed:.1f} images/s")
    if strict and unreadable:
        sys.exit(1)


def find_images(folder: str) -> list[str]:
    """Sorted paths of the image files below a folder, relative to it. Links to folders are not followed."""

    def fail(error: OSError) -> None:
        raise error  # by default, os.walk passes over a folder that it cannot read

    paths = [Path(parent, name) for parent, _, names in os.walk(folder, onerror=fail) for name in names]
    images = sorted(path.relative_to(folder).as_posix() for path in paths if path.suffix.lower() in ENDINGS)
    if not images:
        raise ValueError(f"{folder} holds no images ({', '.join(ENDINGS)})")
    return images


def _caption(vlm: Any, folder: str, names: list[str], adapter: str) -> list[dict[str, str]]:
    """A row for every image; one that cannot be decoded does not fail the others."""
    images, rows = {}, {}
    for name in names:
        try:
            data = read_bytes(Path(folder, name))
            load_image(data, source=repr(name))
            images[name] = data  # not the decoded image: a batch of large ones would take gigabytes
        except ImageError as error:
            rows[name] = {"image": name, "error": str(error)}
    vlm.batch_size = len(names)
    captions = vlm.caption(list(images.values()), adapter) if images else []
    for name, caption in zip(images, captions, strict=True):
        rows[name] = {"image": name, "caption": caption, "adapter": adapter}
    return [rows[name] for name in names]


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
        raise ValueError(f"{output} was made with other {differ}; --overwrite it, or name another --output")
    with output.open("r+b") as file:
        lines = [line for line in file if line.endswith(b"\n")]
        file.truncate(sum(map(len, lines)))
    heads = [f'{{"image": {json.dumps(name)}, '.encode() for name in names]
    if len(lines) > len(names) or not all(map(bytes.startswith, lines, heads)):
        raise ValueError(f"{output} was edited: its rows are not the folder's first images, in order")
    return len(lines), sum(b', "error": ' in line for line in lines)  # a caption's own quotes are escaped


def _identity(run: str, manifest: Manifest, adapter: str) -> str:
    """What decides about a run's captions; not its metrics and facts, which a later test changes."""
    files = [Path(run, PROJECTOR), *sorted(Path(run, "adapters", adapter).glob("adapter_*"))]
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    return hash_json([manifest.identity, manifest.vision, manifest.template, manifest.instructions, hashes])


def _hash(folder: str, names: list[str]) -> str:
    """Names and sizes of the images; a broken link has none."""
    paths = [Path(folder, name) for name in names]
    return hash_json([names, [path.stat().st_size if path.exists() else None for path in paths]])


if __name__ == "__main__":
    try:
        flags = ("--strict", "--overwrite")  # jsonargparse's booleans want a value
        auto_cli(caption_images, args=[f"{word}=true" if word in flags else word for word in sys.argv[1:]])
    except Timeout as error:
        sys.exit(f"error: another run is writing this output: it holds {error.lock_file}")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")

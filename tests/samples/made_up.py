"""Samples of tiny made-up wheels."""

import dataclasses
import hashlib
import zipfile
from pathlib import Path

from mmpeft.samples import catalogue
from mmpeft.samples.sample import MadeSample, WheelSample


def fake_sample(folder: Path, name: str, text: str = "data") -> WheelSample:
    """A sample whose wheel holds one text file, which its build copies."""
    wheel = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        info = f"{name}-1.0.dist-info"
        archive.writestr(f"{info}/LICENSE", f"LICENSE of {name}")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{name}/data.txt", text)
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()

    def build(archive: zipfile.ZipFile, target: Path) -> None:
        (target / "data.txt").write_bytes(archive.read(f"{name}/data.txt"))
        (target / "images").mkdir()
        (target / "images" / "0.png").write_text("pixels")

    return WheelSample(name=name, package=name, version="1.0", wheel=wheel.name, sha256=sha256, build=build)


def set_build(monkeypatch, number: int, build) -> None:
    """Replace how sample `number` is built."""
    samples = list(catalogue.SAMPLES)
    samples[number] = dataclasses.replace(samples[number], build=build)
    monkeypatch.setattr(catalogue, "SAMPLES", tuple(samples))


def fail(*_):
    raise AssertionError("nothing should be built")


def names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


COMPLETE = {"one", "two", "manifest.json", ".lock"}


def made_sample(version: str = "1") -> MadeSample:
    """A sample made from what the wheel of `one` left."""

    def build(root: Path, target: Path) -> None:
        (target / "twice.txt").write_text(2 * (root / "one" / "data.txt").read_text())

    return MadeSample(name="three", package="one", version=version, build=build)

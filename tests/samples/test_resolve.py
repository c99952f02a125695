"""Names of embedded parts and files -> their paths."""

from pathlib import Path

import pytest

from mmpeft import paths, samples
from mmpeft.samples import catalogue


def test_resolve_leaves_other_names_alone(wheels):
    assert paths.resolve("org/model") == "org/model"
    assert paths.resolve(Path("data") / "embedded") == str(Path("data") / "embedded")


def test_resolve_finds_parts_and_files(wheels):
    root = samples.prepare(packages=str(wheels))
    assert paths.resolve("embedded/one") == str(root / "one")
    assert paths.resolve("embedded/one/images/0.png") == str(root / "one" / "images" / "0.png")


def test_resolve_before_prepare_says_to_run_it(wheels):
    with pytest.raises(FileNotFoundError, match=r"closest name: 'embedded/one'\. Run `mmpeft prepare`"):
        paths.resolve("embedded/ones")


def test_resolve_names_the_closest_file(wheels):
    samples.prepare(packages=str(wheels))
    with pytest.raises(FileNotFoundError, match=r"closest name: 'embedded/two/data\.txt'"):
        paths.resolve("embedded/two/dato.txt")


def test_resolve_refuses_a_truncated_part(wheels):
    root = samples.prepare(packages=str(wheels))
    (root / "one" / "data.txt").write_text("da")
    with pytest.raises(FileNotFoundError, match=r"data\.txt has 2 bytes, wanted 4.*prepare"):
        paths.resolve("embedded/one")
    assert paths.resolve("embedded/two")


def test_the_names_that_can_be_told_before_prepare_are_the_catalogue():
    assert list(paths.EMBEDDED) == [sample.name for sample in catalogue.SAMPLES]


def test_home_is_the_variable_or_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("MMPEFT_HOME", str(tmp_path))
    assert paths.home() == tmp_path
    monkeypatch.delenv("MMPEFT_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert paths.home() == tmp_path / "cache" / "mmpeft"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert paths.home() == Path.home() / ".cache" / "mmpeft"

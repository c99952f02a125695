"""A run whose base was named by relative paths: asked from any folder, and never mistaken for a model of the hub."""

import json
import shutil

import pytest
import yaml

import mmpeft
from mmpeft.cli import main
from mmpeft.errors import MissingFileError
from mmpeft.runs.manifest import MANIFEST
from mmpeft.runs.merge import merge_run
from tests.tiny import make_config

QUESTION = "what color is it?"


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_base, tiny_data):
    """A folder with a base, and a run that was trained in it."""
    folder = tmp_path_factory.mktemp("a project")
    shutil.copytree(tiny_base, folder / "base")
    settings = yaml.safe_load(make_config(folder / "config.yaml", tiny_base, tiny_data).read_text())
    settings["model"]["language"]["name"] = "base/language"
    settings["model"]["vision"]["weights"] = "base/vision.safetensors"
    settings["trainer"] |= {"default_root_dir": "run", "max_steps": 1}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        main(["fit", "--config", "config.yaml"])
    return folder


def test_a_run_is_asked_tested_and_merged_from_another_folder(project, tmp_path, monkeypatch):
    monkeypatch.chdir(project)
    here = mmpeft.load("run").ask(None, QUESTION)
    monkeypatch.chdir(tmp_path)
    assert mmpeft.load(str(project / "run")).ask(None, QUESTION) == here
    run = shutil.copytree(project / "run", tmp_path / "run")
    main(["test", "--run", str(run)])
    assert (run / "metrics.json").exists()
    merged = merge_run(run, output=tmp_path / "merged").directory
    monkeypatch.chdir("/")
    assert mmpeft.load(str(merged)).ask(None, QUESTION) == here


def test_a_project_that_moves_whole_is_found_from_within(project, tmp_path, monkeypatch):
    moved = shutil.copytree(project, tmp_path / "moved")
    content = json.loads((moved / "run" / MANIFEST).read_text())
    assert content["language"]["name"] == "base/language"
    content["places"] = dict.fromkeys(content["places"], "/gone")
    (moved / "run" / MANIFEST).write_text(json.dumps(content))
    monkeypatch.chdir(moved)
    assert mmpeft.load("run").ask(None, QUESTION)


@pytest.mark.parametrize("part", ["language", "vision"])
def test_a_base_that_is_gone_is_told_with_both_places(project, tmp_path, monkeypatch, part):
    run = shutil.copytree(project / "run", tmp_path / "run")
    content = json.loads((run / MANIFEST).read_text())
    lay = {"language": str(project / "base/language"), "vision": str(project / "base/vision.safetensors")}
    assert content["places"] == lay
    content["places"][part] = "/gone"
    (run / MANIFEST).write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    if part == "language":  # no hub is asked for it
        monkeypatch.setattr("mmpeft.models.language.load_pretrained", None)
    with pytest.raises(
        MissingFileError, match=rf"{part} model 'base/.*' is neither in {tmp_path} nor at /gone"
    ):
        mmpeft.load(str(run))
    with pytest.raises(SystemExit, match=rf"{part} model 'base/.*' is neither in"):
        main(["test", "--run", str(run)])

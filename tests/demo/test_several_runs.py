"""Finetunes of several runs of one base on the demo's page, each as its own run answers."""

import json
import shutil

import pytest

import mmpeft
from mmpeft.adapters import IA3Config
from mmpeft.cli import main
from mmpeft.errors import RefusedError
from mmpeft.runs.files import save_run
from mmpeft.runs.layout import MANIFEST
from mmpeft.runs.manifest import read_manifest

pytest.importorskip("gradio")

from mmpeft.demo.asked import Upload, asked_by
from mmpeft.demo.of_runs import OfRuns

QUESTION = "what color is it?"


@pytest.fixture(scope="module")
def other(tiny_run, randomise, tmp_path_factory):
    """A run of the tiny base with two finetunes that change much, and another projector."""
    folder = tmp_path_factory.mktemp("runs") / "an other"
    vlm = mmpeft.load(str(tiny_run), "cpu")
    vlm.model.bank.add("tfew", IA3Config())
    for name in vlm.adapters:
        randomise(vlm.model.bank, name)
    for slot in {0, *vlm.model.projector_slots.values()}:
        tensors = vlm.model.projector.tensors(slot)
        vlm.model.projector.fill({key: 1.5 * tensor for key, tensor in tensors.items()}, slot)
    vlm.manifest.choices = {"tfew": {"vqa": {"": ["red", "blue", "green"]}}}
    save_run(folder, vlm.manifest, vlm.model)
    return folder


def answers_of(source, image, finetunes, **changes):
    how = {"task": "Question", "question": QUESTION, "choices": None, "earlier": None} | changes
    asked = asked_by([Upload(str(image), image.name)], finetunes=finetunes, **how)
    return asked, [*source.ask(asked)][-1]


def test_each_answers_as_in_its_own_run(tiny_run, other, red):
    first, second = mmpeft.load(str(tiny_run), "cpu"), mmpeft.load(str(other), "cpu")
    names = ["run", "an-other.default", "an-other.tfew", "base"]
    with OfRuns([tiny_run, other], "cpu") as source:
        assert source.finetunes == names
        _, answers = answers_of(source, red, names)
        _, written = answers_of(source, red, names, task="Caption", question="")
    assert [own.error for own in answers] == [None] * 4
    assert [own.text for own in answers] == [
        first.ask(red, QUESTION),
        second.ask(red, QUESTION, "default"),
        second.ask(red, QUESTION, "tfew"),
        first.ask(red, QUESTION, "base"),
    ]
    assert answers[1].text != first.ask(red, QUESTION)
    ranking = second.rank(red, QUESTION, ["red", "blue", "green"], "tfew")
    assert [choice for choice, _ in answers[2].ranking] == [choice for choice, _ in ranking]
    assert [score for _, score in answers[2].ranking] == pytest.approx([s for _, s in ranking], abs=1e-5)
    assert answers[2].remarks[0].startswith("an-other.tfew chose among the answers")
    assert [own.text for own in written[:2]] == [first.caption(red), second.caption(red, "default")]


def test_the_page_tells_of_each_and_copies_code_for_each(tiny_run, other, red):
    with OfRuns([tiny_run, other], "cpu") as source:
        asked, answers = answers_of(source, red, ["run", "an-other.default"])
        python, curl = source.code(asked, answers)
        assert [about.name for about in source.about] == ["run", "an other"]
    assert python.startswith("import mmpeft\n")
    assert python.count("import") == 1
    assert python.count("mmpeft.load(") == curl.count("# mmpeft serve --run") == 2
    assert f"mmpeft.load({str(other)!r})" in python
    assert f"# mmpeft serve --run '{other}'" in curl


@pytest.mark.parametrize(
    ("section", "change", "told"),
    [
        ("template", {"layout": "plain"}, "template.layout: is 'plain', found 'minigpt'"),
        ("language", {"dtype": "bfloat16"}, "language.dtype: is 'bfloat16', found 'float32'"),
        ("identity", {"tokenizer": "0" * 64}, "does not belong to this base"),
    ],
)
def test_runs_that_read_otherwise_are_refused(tiny_run, other, tmp_path, section, change, told):
    copied = tmp_path / "copied"
    shutil.copytree(other, copied)
    manifest = json.loads((copied / MANIFEST).read_text())
    manifest[section] |= change
    (copied / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(RefusedError, match=told):
        with OfRuns([tiny_run, copied], "cpu"):
            pass


def test_damaged_files_of_another_run_are_refused(tiny_run, other, tmp_path):
    copied = tmp_path / "copied"
    shutil.copytree(other, copied)
    for file in ("adapters/tfew/projector.safetensors", "adapters/tfew/adapter_model.safetensors"):
        whole = (copied / file).read_bytes()
        (copied / file).write_bytes((copied / file.replace("tfew", "default")).read_bytes()[:-4] + b"abcd")
        with pytest.raises(RefusedError, match=file):
            with OfRuns([tiny_run, copied], "cpu"):
                pass
        (copied / file).write_bytes(whole)


def test_a_run_from_before_a_setting_reads_as_that_is_by_default(tiny_run, other, red, tmp_path):
    copied = tmp_path / "older"
    shutil.copytree(other, copied)
    manifest = json.loads((copied / MANIFEST).read_text())
    for section, names in {"vision": ("fit", "image", "feature_dtype"), "language": ("attention",)}.items():
        for name in names:
            del manifest[section][name]
    manifest["vision"]["crop"] = False  # squash, as it was called
    (copied / MANIFEST).write_text(json.dumps(manifest))
    with OfRuns([tiny_run, copied], "cpu") as source:
        assert "older.tfew" in source.finetunes


def test_a_folder_called_as_a_finetune_of_the_first_run_is_refused(tiny_run, other, tmp_path, monkeypatch):
    """The engine has that name already."""
    copied = tmp_path / "tfew"
    shutil.copytree(tiny_run, copied)
    monkeypatch.setattr("mmpeft.demo.of_runs.load", None)
    with pytest.raises(RefusedError, match="there is a finetune 'tfew' already"):
        OfRuns([other, copied], "cpu")


def test_two_runs_of_one_name_are_refused(tiny_run, tmp_path):
    same = tmp_path / "run"
    shutil.copytree(tiny_run, same)
    assert read_manifest(same).adapters == ["default"]
    with pytest.raises(SystemExit, match=r"error: .*there is a finetune 'run' already; rename the folder"):
        main(["demo", "--run", str(tiny_run), str(same), "--port", "0"])

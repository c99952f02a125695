"""Damaged finetunes are noticed and refused by name, and leave the others of their run alone."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import mmpeft
from mmpeft.adapters import HybridConfig, IA3Config, LoraConfig
from mmpeft.errors import RefusedError
from mmpeft.inference import adapter_check
from mmpeft.runs.combine import combine_run
from mmpeft.runs.files import PROJECTOR, adapter_folder, load_run, load_trained, save_run
from mmpeft.runs.manifest import MANIFEST, read_manifest
from mmpeft.runs.merge import merge_run

FINETUNES = {
    "first": LoraConfig(4, 8),
    "mixed": HybridConfig([IA3Config(layers=[0]), LoraConfig(2, 4, layers=[1])]),
    "own": LoraConfig(4, 8),
}
"""Of these, "own" has a projector of its own; the others share one with rows of the base."""
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
QUESTION, CHOICES = "what color is it?", ["red", "green", "blue"]


@pytest.fixture(scope="module")
def joint(make_joint, tmp_path_factory):
    """A run of `FINETUNES`, all far from the base."""
    return make_joint(tmp_path_factory.mktemp("damage") / "run", FINETUNES, "own")


@pytest.fixture
def run(joint, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(joint, tmp_path / "run")


@pytest.fixture
def image(tiny_data):
    return str(tiny_data / "images" / "red0.png")


def flip(path, place=-1):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def change_alpha(path):
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"lora_alpha": fields["lora_alpha"] * 2}, indent=2))


def poison(path):
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] = torch.nan
    save_file(tensors, path, {"format": "pt"})


def forget_hashes(run):
    """As a run that was written before there were any."""
    content = json.loads((run / MANIFEST).read_text())
    del content["adapter_files"]
    (run / MANIFEST).write_text(json.dumps(content))


DAMAGE = {
    "flipped": (WEIGHTS, flip),
    "rescaled": (CONFIG, change_alpha),
    "truncated": (WEIGHTS, lambda path: path.write_bytes(path.read_bytes()[:-8])),
    "cut": (CONFIG, lambda path: path.write_text(path.read_text()[:40])),
    "empty": (WEIGHTS, lambda path: path.write_bytes(b"")),
    "missing weights": (WEIGHTS, lambda path: path.unlink()),
    "missing config": (CONFIG, lambda path: path.unlink()),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize(("name", "part"), [("first", ""), ("mixed", "1_lora")])
def test_a_damaged_adapter_is_refused_by_name_wherever_it_is_loaded(run, tmp_path, kind, name, part):
    file, damage = DAMAGE[kind]
    path = adapter_folder(run, name) / part / file
    damage(path)
    told = rf"{name}/{f'{part}/' if part else ''}{file} is .*put back the file"
    other = load_run(run, with_adapters=False)[0]
    uses = {
        "load_run": lambda: load_run(run),
        "load_trained": lambda: load_trained(run, other, {"renamed": name}),
        "merge": lambda: merge_run(run, name, tmp_path / "merged"),
        "combine": lambda: combine_run(run, ["first", "own"], output=tmp_path / "combined"),
    }
    for use in uses.values():
        with pytest.raises(RefusedError, match=told):
            use()
    assert not (tmp_path / "merged").exists()
    assert not (tmp_path / "combined").exists()
    assert other.bank.names == []


def test_every_file_of_an_adapter_is_in_the_manifest(joint):
    found = {
        name: {path.relative_to(adapter_folder(joint, name)).as_posix() for path in files}
        for name in FINETUNES
        if (files := [*adapter_folder(joint, name).rglob("adapter_*")])
    }
    assert {name: files.keys() for name, files in read_manifest(joint).adapter_files.items()} == found
    assert len(found["mixed"]) == 5


def test_other_files_beside_an_adapter_do_no_harm(run):
    (adapter_folder(run, "first") / "README.md").write_text("mine")
    (adapter_folder(run, "first") / ".DS_Store").touch()
    load_run(run)


def test_what_rewrites_an_adapter_writes_its_hashes(run):
    model, _, manifest = load_run(run)
    model.bank.remove("own")
    for tensor in model.bank.tensors("first").values():
        tensor.mul_(2)
    save_run(run, manifest, model)
    assert [*read_manifest(run).adapter_files] == ["first", "mixed"]
    load_run(run)


def test_a_run_without_hashes_loads_as_before(run, image):
    before = mmpeft.load(str(run), "cpu").rank(image, QUESTION, CHOICES, "mixed")
    forget_hashes(run)
    flip(adapter_folder(run, "first") / WEIGHTS)
    assert mmpeft.load(str(run), "cpu").rank(image, QUESTION, CHOICES, "mixed") == before
    (adapter_folder(run, "first") / WEIGHTS).unlink()
    with pytest.raises(RefusedError, match=f"has no {WEIGHTS}"):
        load_run(run)


def damaged_projector(run, name):
    flip(adapter_folder(run, name) / PROJECTOR)


UNUSABLE = {
    "flipped": lambda run, name: flip(adapter_folder(run, name) / WEIGHTS),
    "gone": lambda run, name: shutil.rmtree(adapter_folder(run, name)),
    "nan": lambda run, name: (forget_hashes(run), poison(adapter_folder(run, name) / WEIGHTS)),
    "projector": damaged_projector,
    "no projector": lambda run, name: (adapter_folder(run, name) / PROJECTOR).unlink(),
}


def test_one_that_fails_its_check_leaves_the_others_alone(run, capsys, monkeypatch):
    def fails(model, name):
        if name == "own":
            raise RefusedError("own on this model changes nothing")

    monkeypatch.setattr(adapter_check, "_check", fails)
    monkeypatch.setattr(adapter_check, "kind_of", lambda entry: str(id(entry)))  # none is known
    capsys.readouterr()
    vlm = mmpeft.load(str(run), "cpu")
    assert vlm.adapters == [name for name in FINETUNES if name != "own"]
    assert (
        "'own' cannot be asked, the others can: own on this model changes nothing" in capsys.readouterr().err
    )
    with pytest.raises(RefusedError, match="'own' cannot be asked"):
        vlm.ask(None, "what?", adapter="own")


@pytest.mark.parametrize("kind", UNUSABLE)
@pytest.mark.parametrize("name", ["first", "own"])
def test_one_unusable_finetune_leaves_the_others_alone(joint, run, image, capsys, kind, name):
    UNUSABLE[kind](run, name)
    capsys.readouterr()
    vlm = mmpeft.load(str(run), "cpu")
    lines = [line for line in capsys.readouterr().err.splitlines() if "cannot be asked" in line]
    assert len(lines) == 1
    assert lines[0].startswith(
        f"{run}: {name!r} cannot be asked, the others can: {adapter_folder(run, name)}/"
    )
    others = [other for other in FINETUNES if other != name]
    assert vlm.adapters == others
    whole = mmpeft.load(str(joint), "cpu")
    for other in (*others, "base"):
        asked = image, QUESTION, CHOICES, other
        assert dict(vlm.rank(*asked)) == pytest.approx(dict(whole.rank(*asked)), abs=1e-5)
    for asked in (name, [name, others[0]], *([None] if name == "first" else [])):
        with pytest.raises(RefusedError, match=str(adapter_folder(run, name))):
            vlm.ask([image, image] if isinstance(asked, list) else image, QUESTION, asked)
    if name != "first":
        assert vlm.rank(image, QUESTION, CHOICES) == vlm.rank(image, QUESTION, CHOICES, "first")


def test_an_unusable_one_does_not_stand_in_the_way_of_a_merge(run, tmp_path):
    damaged_projector(run, "own")
    flip(adapter_folder(run, "mixed") / CONFIG)
    merge_run(run, "first", tmp_path / "merged")


def test_a_run_of_unusable_finetunes_is_refused(run):
    for name in FINETUNES:
        flip(adapter_folder(run, name) / CONFIG)
    with pytest.raises(RefusedError, match=f"first/{CONFIG} is not the file"):
        mmpeft.load(str(run), "cpu")


def test_a_projector_that_rows_without_finetune_need_too_is_refused(run):
    """Where every finetune that shares it has lost its copy."""
    for name in ("first", "mixed"):
        damaged_projector(run, name)
    with pytest.raises(RefusedError, match=f"first/{PROJECTOR} is not the projector"):
        mmpeft.load(str(run), "cpu")


def test_a_projector_that_diverged_leaves_its_finetune_out(joint, tmp_path):
    model, _, manifest = load_run(joint)
    with torch.no_grad():
        model.projector.weight[1, 0, 0] = torch.inf
    save_run(tmp_path, manifest, model)
    vlm = mmpeft.load(str(tmp_path), "cpu")
    assert vlm.adapters == ["first", "mixed"]
    with pytest.raises(RefusedError, match=f"own/{PROJECTOR} holds NaN or infinite values"):
        vlm.ask(None, QUESTION, "own")

"""`mmpeft combine`: a run of several finetunes -> a run of their combination, with the projector it goes with."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from mmpeft.adapters import IA3Config, LoraConfig
from mmpeft.adapters.combine import combine
from mmpeft.cli import main
from mmpeft.errors import RefusedError
from mmpeft.inference.vlm import load
from mmpeft.runs.combine import combine_run
from mmpeft.runs.files import load_run
from mmpeft.runs.manifest import read_manifest, write_manifest

FINETUNES = {"a": LoraConfig(4, 8), "b": LoraConfig(4, 8), "c": LoraConfig(4, 4), "tfew": IA3Config()}
OWNER = "b"
"""The finetune with a projector of its own."""


@pytest.fixture(scope="module")
def run(make_joint, tmp_path_factory):
    """A run of four finetunes with random weights, one of them with a projector of its own."""
    return make_joint(tmp_path_factory.mktemp("combine") / "run", FINETUNES, OWNER)


def test_a_combination_answers_as_it_does_beside_the_others(run, tmp_path, tiny_data):
    words = "--adapters a c --name new --method ties --density 0.7 --weights 0.8 -0.3"
    main(["combine", str(run), *words.split(), "--output", str(tmp_path / "out")])
    beside = load(str(run), "cpu")
    combine(beside.model.bank, ["a", "c"], "new", "ties", [0.8, -0.3], density=0.7)
    made = load(str(tmp_path / "out"), "cpu")
    assert made.adapters == ["new"]
    image, choices = str(tiny_data / "images" / "red0.png"), ["red", "green", "blue"]
    for adapter in ("new", "base"):
        assert made.rank(image, "what?", choices, adapter) == beside.rank(image, "what?", choices, adapter)
    assert made.rank(image, "what?", choices) != beside.rank(image, "what?", choices, "a")
    manifest = read_manifest(tmp_path / "out")
    assert manifest.metrics == {}
    assert manifest.facts["combined"] == f"ties of a, c, weighted 0.8, -0.3, from {run}"


def test_a_combination_knows_the_choices_that_its_parts_agree_on(run, tmp_path):
    same, colours = {"": ["circle", "square"]}, {"": ["red", "blue"]}
    manifest = read_manifest(run)
    manifest.choices = {
        "a": {"shape": same, "color": colours},
        "c": {"shape": same, "color": {"": ["red"]}},
        "b": {"other": {}},
    }
    manifest.without_images = ["a", "b"]
    write_manifest(shutil.copytree(run, tmp_path / "run"), manifest)
    made = read_manifest(combine_run(tmp_path / "run", ["a", "c"], "new", output=tmp_path / "out"))
    assert made.choices == {"new": {"shape": same, "color": {}}}
    assert made.without_images == []


def test_the_command_says_how_to_ask_and_ask_takes_it(run, tmp_path, tiny_data, capsys):
    output = str(tmp_path / "out")
    main(["combine", str(run), "--adapters=[a,c]", "--method=svd", "--rank=2", "--output", output])
    assert f"mmpeft ask --run {output}" in capsys.readouterr().out
    image = str(tiny_data / "images" / "red0.png")
    main(["ask", "what?", "--run", output, "--image", image, "--max_new_tokens", "2"])
    weights = load_file(tmp_path / "out" / "adapters" / "combined" / "adapter_model.safetensors")
    assert {len(tensor) for key, tensor in weights.items() if "lora_A" in key} == {2}


def test_different_projectors_are_refused_by_name_unless_one_is_chosen(run, tmp_path):
    with pytest.raises(RefusedError, match=r"a and b were trained with different projectors.*--projector_of"):
        combine_run(run, ["a", "b"], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    held, _, _ = load_run(run)
    for name in ("a", "b"):
        made, _, _ = load_run(combine_run(run, ["a", "b"], projector_of=name, output=tmp_path / name))
        slots = held.projector_slots.get(name, 0), made.projector_slots.get("combined", 0)
        before, after = held.projector.tensors(slots[0]), made.projector.tensors(slots[1])
        assert all(torch.equal(before[key], after[key]) for key in before)


def test_federated_is_the_mean_of_the_clients_by_their_examples(run, tmp_path):
    directory = combine_run(
        run, ["a", "b"], "mean", "federated", [30, 10], projector_of="a", output=tmp_path / "out"
    )
    key = "adapter_model.safetensors"
    a, b = (load_file(run / "adapters" / name / key) for name in ("a", "b"))
    made = load_file(directory / "adapters" / "mean" / key)
    for name, tensor in made.items():
        torch.testing.assert_close(tensor, 0.75 * a[name] + 0.25 * b[name])
    with pytest.raises(RefusedError, match=r"one config; a has .* c has"):
        combine_run(run, ["a", "c"], method="federated", output=tmp_path / "other")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"adapters": ["a", "nobody"]}, "no finetune 'nobody'; there are: a, b, c, tfew"),
        ({"adapters": ["a"]}, "wanted two or more"),
        ({"adapters": ["a", "a"]}, "each once"),
        ({"adapters": ["a", "tfew"]}, "all must be of one method"),
        ({"name": "a"}, "already has an adapter 'a'"),
        ({"method": "mean"}, "method is 'mean'"),
        ({"projector_of": "b"}, "wanted one of a, c"),
    ],
)
def test_what_cannot_be_combined_is_told_and_nothing_is_written(run, tmp_path, changes, told):
    with pytest.raises(RefusedError, match=told):
        combine_run(run, **{"adapters": ["a", "c"], "output": tmp_path / "out"} | changes)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_empty_is_left_alone(run, tmp_path):
    (tmp_path / "precious").touch()
    with pytest.raises(RefusedError, match="not an empty folder"):
        combine_run(run, ["a", "c"], output=tmp_path)

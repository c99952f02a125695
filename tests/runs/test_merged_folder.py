"""A merged folder is a run without adapters, whose base is the folder itself, wherever it is moved."""

import json
import re
import shlex
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import mmpeft
from mmpeft.adapters import LoraConfig
from mmpeft.cli import main
from mmpeft.errors import RefusedError
from mmpeft.experiments.steps import weights_of
from mmpeft.hashing import hash_weight_files
from mmpeft.models.language import LanguageConfig, load_language_model
from mmpeft.models.projector import Projector
from mmpeft.runs.combine import combine_run
from mmpeft.runs.files import PROJECTOR, adapter_folder, load_run, save_run
from mmpeft.runs.layout import CONFIG
from mmpeft.runs.manifest import FORMAT, MANIFEST, read_manifest, write_manifest
from mmpeft.runs.merge import merge_run
from tests.tiny import make_config, run_directory

QUESTIONS = ["what color is it?", "is it red?", "is it blue?"]
CHOICES = ["red", "blue", "a green square"]


def copied(source, run, **language):
    """A copy of a run, with other fields of its language model."""
    shutil.copytree(source, run)
    content = json.loads((run / MANIFEST).read_text())
    content["language"] |= language
    (run / MANIFEST).write_text(json.dumps(content))
    return run


@pytest.fixture
def run(tiny_run, tmp_path, add_tfew):
    return add_tfew(copied(tiny_run, tmp_path / "run"))


@pytest.fixture
def images(tiny_data):
    return [str(path) for path in sorted((tiny_data / "images").glob("*.png"))[:3]]


def scores(vlm, images, adapter=None):
    return [dict(ranked) for ranked in vlm.rank(images, QUESTIONS, CHOICES, adapter)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["default", "tfew"])
def test_it_answers_as_the_adapter_did(tiny_run, tmp_path, images, add_tfew, dtype, name):
    run = add_tfew(copied(tiny_run, tmp_path / "run", dtype=dtype))
    merged = merge_run(run, name, tmp_path / "merged")
    before, after = mmpeft.load(str(run), "cpu"), mmpeft.load(str(tmp_path / "merged"), "cpu")
    assert after.adapters == []
    assert after.model.dtype == getattr(torch, dtype)
    for own, other, base in zip(
        scores(before, images, name), scores(after, images), scores(before, images, "base"), strict=True
    ):
        assert other == pytest.approx(own, abs=max(2 * merged.difference, 1e-5))
        assert own != pytest.approx(base, abs=0.1 if dtype == "bfloat16" else 1e-3)
    if dtype == "float32":
        assert after.ask(images, QUESTIONS) == before.ask(images, QUESTIONS, name)
        assert after.ask(None, "is red a color?") == before.ask(None, "is red a color?", name)
        assert after.caption(images[0]) == before.caption(images[0], name)


def test_it_may_move_and_knows_what_it_is(run, tmp_path, images, capsys):
    merge_run(run, "default", tmp_path / "merged")
    before = mmpeft.load(str(tmp_path / "merged"), "cpu").ask(images, QUESTIONS)
    moved = shutil.move(tmp_path / "merged", tmp_path / "elsewhere")
    assert mmpeft.load(str(moved), "cpu").ask(images, QUESTIONS) == before
    main(["ask", QUESTIONS[0], "--run", str(moved), "--image", images[0]])
    assert before[0] in capsys.readouterr().out
    manifest, trained = read_manifest(moved), read_manifest(run)
    assert (manifest.format, manifest.adapters, manifest.language["name"]) == (FORMAT, [], ".")
    assert str(tmp_path) not in json.dumps([manifest.language, manifest.identity["language"]])
    assert manifest.projectors == {"base": trained.projectors["default"]}
    assert (manifest.instructions, manifest.answer_tokens) == (trained.instructions, trained.answer_tokens)
    assert manifest.identity["language"]["weights"] != trained.identity["language"]["weights"]
    assert manifest.facts == {"merged": f"default of {run}"}
    assert weights_of(moved)


@pytest.mark.parametrize("name", ["default", "tfew"])
def test_it_chooses_where_the_finetune_did(run, tmp_path, images, name):
    manifest = read_manifest(run)
    manifest.choices, manifest.without_images = {"tfew": {"vqa": {"": CHOICES}}}, ["tfew"]
    write_manifest(run, manifest)
    merge_run(run, name, tmp_path / "merged")
    before, after = mmpeft.load(str(run), "cpu"), mmpeft.load(str(tmp_path / "merged"), "cpu")
    answers = after.ask(images, QUESTIONS)
    assert answers == before.ask(images, QUESTIONS, name)
    assert ({*answers} <= {*CHOICES}) == (name == "tfew")
    assert after.manifest.without_images == (["base"] if name == "tfew" else [])


def test_its_projector_is_that_of_the_finetune(run, tmp_path, images):
    """Also where rows of the base have another."""
    model, _, manifest = load_run(run)
    grown = Projector(model.vision_encoder.dim, model.projector.weight.shape[1], 2)
    grown.fill(model.projector.tensors(0), 0)
    torch.nn.init.normal_(grown.weight[1])
    model.projector, model.projector_slots = grown, {"tfew": 1}
    save_run(run, manifest, model)
    merge_run(run, "tfew", tmp_path / "merged")
    projector, own = (
        load_file(folder / PROJECTOR) for folder in (tmp_path / "merged", adapter_folder(run, "tfew"))
    )
    assert projector.keys() == {"weight", "bias"}
    assert all(torch.equal(projector[key], own[key]) for key in own)
    before, after = mmpeft.load(str(run), "cpu"), mmpeft.load(str(tmp_path / "merged"), "cpu")
    assert after.ask(images, QUESTIONS) == before.ask(images, QUESTIONS, "tfew")


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_merge_answers_too(tiny_run, tmp_path, images, add_tfew, quantization):
    run = add_tfew(copied(tiny_run, tmp_path / "run", quantization=quantization))
    merged = merge_run(run, "tfew", tmp_path / "merged", quantization)
    before, after = mmpeft.load(str(run), "cpu"), mmpeft.load(str(tmp_path / "merged"), "cpu")
    for own, other in zip(scores(before, images, "tfew"), scores(after, images), strict=True):
        assert other == pytest.approx(own, abs=0.05 * merged.change)


def test_text_alone_is_merged_without_a_projector(tmp_path, tiny_base, tiny_data, randomise):
    text = str(tiny_data / "text.jsonl")
    config = make_config(
        tmp_path / "text.yaml",
        tiny_base,
        tiny_data,
        model={"vision": None},
        data={"train": text, "val": text, "test": text},
        trainer={"max_steps": 1},
    )
    main(["fit", "--config", str(config)])
    run = run_directory(config)
    model, _, manifest = load_run(run)
    randomise(model.bank, "default")
    save_run(run, manifest, model)
    merge_run(run, None, tmp_path / "merged")
    assert not (tmp_path / "merged" / PROJECTOR).exists()
    before, after = mmpeft.load(str(run), "cpu"), mmpeft.load(str(tmp_path / "merged"), "cpu")
    assert after.ask(None, QUESTIONS) == before.ask(None, QUESTIONS)
    with pytest.raises(RefusedError, match="no vision encoder"):
        after.ask(str(tiny_data / "images" / "red0.png"), QUESTIONS[0])


def test_it_is_still_a_plain_folder(run, tmp_path):
    merge_run(run, "default", tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == plain.config.vocab_size


def test_there_is_nothing_to_merge_or_combine_in_it(run, tmp_path):
    merge_run(run, "default", tmp_path / "merged")
    for use in (merge_run, combine_run):
        with pytest.raises(RefusedError, match=r"merged has no adapters: .* nothing to merge or combine"):
            use(tmp_path / "merged")
    with pytest.raises(RefusedError, match="no finetune 'default'"):
        mmpeft.load(str(tmp_path / "merged"), "cpu").ask(None, "what?", "default")


@pytest.mark.parametrize("file", ["model.safetensors", PROJECTOR])
def test_changed_weights_are_refused(run, tmp_path, file):
    merge_run(run, "default", tmp_path / "merged")
    path = tmp_path / "merged" / file
    save_file({key: tensor + 1 for key, tensor in load_file(path).items()}, path, {"format": "pt"})
    with pytest.raises(
        RefusedError, match=r"merged does not belong to this base:\n.*weights|is not the projector"
    ):
        mmpeft.load(str(tmp_path / "merged"), "cpu")


def test_runs_on_merged_folders_of_before_keep_their_identity(run, tmp_path):
    """They recorded the projector beside the weights as one of them."""
    merge_run(run, "default", tmp_path / "merged")
    files = sorted((tmp_path / "merged").glob("*.safetensors"))
    assert len(files) == 2
    assert read_manifest(tmp_path / "merged").identity["language"]["weights"] == hash_weight_files(files)


def test_lora_on_a_base_that_is_quantised_on_disk_is_refused_with_what_helps(run, tmp_path):
    merge_run(run, "tfew", tmp_path / "merged", "nf4")
    model, _, manifest = load_run(tmp_path / "merged")
    model.bank.add("lora", LoraConfig(2))
    save_run(tmp_path / "again", manifest, model)
    with pytest.raises(RefusedError, match="a checkpoint that is dense on disk"):
        merge_run(tmp_path / "again", "lora", tmp_path / "twice")


def test_a_folder_without_its_manifest_was_cut_off(run, tmp_path, monkeypatch):
    monkeypatch.setattr("mmpeft.runs.merge.save_tensors", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        merge_run(run, "default", tmp_path / "merged")
    with pytest.raises(RefusedError, match="is no run of mmpeft"):
        mmpeft.load(str(tmp_path / "merged"))


def test_training_goes_on_from_it(run, tmp_path, tiny_base, tiny_data, images):
    merge_run(run, "default", tmp_path / "merged")
    merged = str(tmp_path / "merged")
    config = make_config(
        tmp_path / "second" / "config.yaml",
        tiny_base,
        tiny_data,
        model={
            "language": {"name": merged, "dtype": "float32"},
            "start_from": merged,
            "learning_rate": 0.0,
            "projector_learning_rate": 0.0,
        },
        trainer={"max_steps": 1},
    )
    main(["fit", "--config", str(config)])
    second = mmpeft.load(str(run_directory(config)), "cpu")
    assert second.ask(images, QUESTIONS) == mmpeft.load(merged, "cpu").ask(images, QUESTIONS)


def test_a_test_of_it_is_refused_with_the_command_that_tests_it(tiny_run, tmp_path):
    run, merged = shutil.copytree(tiny_run, tmp_path / "run"), tmp_path / "merged"
    main(["merge", str(run), "--output", str(merged)])
    with pytest.raises(SystemExit, match="has no data and settings of its own: ask it with") as refused:
        main(["test", "--run", str(merged)])
    command = re.findall("`mmpeft (test .*)`", str(refused.value))[0].replace("RUN/", f"{run}/")
    main(shlex.split(command))
    main(["test", "--run", str(run)])
    found, wanted = ((folder / "predictions.jsonl").read_text() for folder in (tmp_path / "merged-test", run))
    assert found == wanted


def test_a_combination_says_that_it_can_be_asked(run):
    (run / CONFIG).unlink()  # which `mmpeft combine` does not write
    with pytest.raises(SystemExit, match=r"combined, or lost that file, has no data .* `mmpeft ask --run"):
        main(["test", "--run", str(run)])


@pytest.mark.parametrize(("held", "wrong"), [("nf4", "int8"), ("int8", "nf4")])
def test_a_base_that_is_quantised_on_disk_loads_as_it_is(run, tmp_path, held, wrong):
    merge_run(run, "tfew", tmp_path / "merged", held)
    name = str(tmp_path / "merged")
    kinds = {
        quantization: {
            type(module).__name__
            for module in load_language_model(LanguageConfig(name, quantization=quantization)).modules()
        }
        for quantization in (None, held)
    }
    assert kinds[None] == kinds[held]
    assert {"nf4": "Linear4bit", "int8": "Linear8bitLt"}[held] in kinds[None]
    with pytest.raises(RefusedError, match=rf"merged is quantised already, as {held}; .* is {wrong}"):
        load_language_model(LanguageConfig(name, quantization=wrong))

"""The run directory: what is saved comes back, what does not belong together is refused, and PEFT reads it."""

import json
import os
import shutil

import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mmpeft.adapters import IA3Config, LoraConfig
from mmpeft.adapters.methods import stack
from mmpeft.cli import main
from mmpeft.data.encoding import encode_images
from mmpeft.data.images import ImageConfig
from mmpeft.errors import RefusedError
from mmpeft.hashing import hash_tensors
from mmpeft.inference.vlm import VisionLanguageModel, load
from mmpeft.models.projector import Projector
from mmpeft.runs.files import PROJECTOR, adapter_folder, load_run, save_run
from mmpeft.runs.manifest import FORMAT, MANIFEST, NEW_IN_FORMAT_2, read_manifest, write_manifest
from tests.tiny import make_base, make_config, run_directory

QUESTIONS = ["what color is it?", "is it red?", "is it blue?"]


@pytest.fixture
def run(tiny_run, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(tiny_run, tmp_path / "run")


@pytest.fixture
def images(tiny_data):
    return [str(path) for path in sorted((tiny_data / "images").glob("*.png"))[:3]]


def change(run, **sections):
    """Overwrites fields of sections of the manifest."""
    path = run / MANIFEST
    content = json.loads(path.read_text())
    for section, fields in sections.items():
        content[section] |= fields
    path.write_text(json.dumps(content))


def test_a_saved_model_comes_back_bit_for_bit(tiny_run, tmp_path, images, randomise):
    model, template, manifest = load_run(tiny_run)
    randomise(model.bank, "default")
    torch.nn.init.normal_(model.projector.weight)
    save_run(tmp_path / "saved", manifest, model)
    before = VisionLanguageModel(model.eval(), template, manifest)
    after = load(str(tmp_path / "saved"), device="cpu")
    assert after.ask(images, QUESTIONS) == before.ask(images, QUESTIONS)
    choices = ["red", "blue", "yes"]
    assert after.rank(images, QUESTIONS, choices) == before.rank(images, QUESTIONS, choices)
    assert before.ask(images, QUESTIONS) != load(str(tiny_run), device="cpu").ask(images, QUESTIONS)


def test_a_run_without_adapters_is_its_base(tiny_run, tmp_path, images, randomise):
    model, template, manifest = load_run(tiny_run)
    randomise(model.bank, "default")
    torch.nn.init.normal_(model.projector.weight)
    save_run(tmp_path / "saved", manifest, model)
    bare, _, _ = load_run(tmp_path / "saved", with_adapters=False)
    assert not list(bare.bank.state())
    answered = VisionLanguageModel(bare.eval(), template, manifest).rank(images, QUESTIONS, ["red", "blue"])
    beside = VisionLanguageModel(model.eval(), template, manifest).rank(
        images, QUESTIONS, ["red", "blue"], adapter=["base"] * 3
    )
    assert answered == beside


def test_the_manifest_comes_back(tiny_run, tmp_path):
    manifest = read_manifest(tiny_run)
    assert manifest.adapters == ["default"]
    assert manifest.default_task == "vqa"
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest


def test_other_base_weights_are_refused_by_field(run, tmp_path):
    other = make_base(tmp_path / "other", seed=1)
    change(run, language={"name": str(other / "language")})
    with pytest.raises(ValueError, match="does not belong to this base") as error:
        load_run(run)
    assert "language.weights: trained with" in str(error.value)
    assert "language.config" not in str(error.value), "the same architecture"
    assert "vision" not in str(error.value)
    assert "tokenizer" not in str(error.value)


def test_another_transform_is_told_by_its_setting(tiny_run):
    with pytest.raises(SystemExit) as ended:
        main(["test", "--run", str(tiny_run), "--model.vision.fit=pad"])
    assert "model.vision.fit: trained with 'squash', found 'pad'" in str(ended.value)
    assert "Compose" not in str(ended.value)
    with pytest.raises(SystemExit, match=r"model\.vision\.fit: trained with 'squash', found 'tile'"):
        main(["test", "--run", str(tiny_run), "--model.vision.fit=tile"])


def test_another_encoder_is_refused_by_field(run, tmp_path):
    other = make_base(tmp_path / "other", seed=1)
    change(run, vision={"weights": str(other / "vision.safetensors")})
    with pytest.raises(ValueError, match=r"vision.weights: trained with"):
        load_run(run)


@pytest.mark.parametrize(
    ("setting", "field"),
    [
        ({"image_size": 64}, "vision.transform"),
        ({"fit": "crop"}, "vision.transform"),
        ({"image": {"scale": "fixed:0:4095"}}, "vision.image.scale"),
        ({"layer": -2}, "vision.layer"),
        ({"pooling": "average"}, "vision.pooling"),
    ],
)
def test_other_features_of_the_same_encoder_are_refused_by_field(run, setting, field):
    change(run, vision=setting)
    with pytest.raises(ValueError, match=f"{field}: trained with"):
        load_run(run)


def test_a_run_keeps_how_it_reads_images(tiny_base, tiny_data, tmp_path):
    config = make_config(tmp_path / "config.yaml", tiny_base, tiny_data)
    settings = ["scale=fixed:0:4095", "frame=middle", "background=[0,0,0]", "max_pixels=9000"]
    words = [f"--model.vision.image.{setting}" for setting in settings]
    main(["fit", "--config", str(config), "--trainer.max_steps=1", *words])
    run = run_directory(config)
    manifest = read_manifest(run)
    assert manifest.image_config == ImageConfig("fixed:0:4095", "middle", (0, 0, 0), 9000)
    Image.new("I;16", (8, 8), 2048).save(tmp_path / "wide.png")
    vlm = load(str(run), device="cpu")
    encoder = vlm.model.vision_encoder
    assert encoder.image_config == manifest.image_config
    asked = vlm.engine.features([str(tmp_path / "wide.png")])
    grey = encode_images(encoder, [Image.new("RGB", (8, 8), (128,) * 3)])
    assert torch.equal(asked, grey)
    assert encoder.fingerprint["image"] == manifest.image_config.identity
    change(run, vision={"image": {}})
    with pytest.raises(ValueError, match=r"vision.image.scale: trained with 'fixed:0:4095', found None"):
        load(str(run), device="cpu")


def test_a_run_of_before_there_was_fit_is_read(run, images):
    before = load(str(run), device="cpu").ask(images, QUESTIONS)
    path = run / MANIFEST
    content = json.loads(path.read_text())
    del content["vision"]["fit"], content["vision"]["image"]
    content["vision"]["crop"] = False
    path.write_text(json.dumps(content))
    vlm = load(str(run), device="cpu")
    assert vlm.ask(images, QUESTIONS) == before
    assert vlm.manifest.vision_config.fit == "squash"


def test_another_tokenizer_is_refused(run, tiny_base, tmp_path):
    other = shutil.copytree(tiny_base / "language", tmp_path / "language")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.eos_token = "a"
    tokenizer.save_pretrained(other)
    change(run, language={"name": str(other)})
    with pytest.raises(ValueError, match="tokenizer: trained with"):
        load_run(run)


def test_a_base_that_moved_is_the_same_base(run, tiny_base, tmp_path, images):
    before = load(str(run), device="cpu").ask(images[0], QUESTIONS[0])
    moved = shutil.copytree(tiny_base, tmp_path / "elsewhere")
    change(
        run,
        language={"name": str(moved / "language")},
        vision={"weights": str(moved / "vision.safetensors")},
    )
    assert load(str(run), device="cpu").ask(images[0], QUESTIONS[0]) == before


def test_a_changed_projector_is_refused(run):
    path = adapter_folder(run, "default") / PROJECTOR
    tensors = load_file(path)
    tensors["weight"][0, 0] += 1
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"projector.safetensors is not the projector that mmpeft.json was"):
        load_run(run)


def in_format_1(run):
    """The same run as it was written before projectors lay with their finetunes."""
    manifest = read_manifest(run)
    tensors = {}
    for name, path in {
        "base": run / PROJECTOR,
        "default": adapter_folder(run, "default") / PROJECTOR,
    }.items():
        if path.exists():
            tensors |= {f"{name}.{key}": tensor for key, tensor in load_file(path).items()}
            path.unlink()
    if "base.weight" not in tensors:  # a single finetune's was the one of all rows
        tensors = {key.replace("default.", "base."): tensor for key, tensor in tensors.items()}
    save_file(tensors, run / PROJECTOR)
    content = json.loads((run / MANIFEST).read_text())
    for key in NEW_IN_FORMAT_2:
        del content[key]
    (run / MANIFEST).write_text(json.dumps(content | {"format": 1, "projector": hash_tensors(tensors)}))
    return manifest


def test_a_run_of_format_1_is_read_and_answers_as_before(run, images, randomise):
    model, _, manifest = load_run(run)
    randomise(model.bank, "default")
    torch.nn.init.normal_(model.projector.weight)
    save_run(run, manifest, model)
    asked = ["red", "blue", "yes"]
    before = load(str(run), device="cpu").rank(images, QUESTIONS, asked)
    in_format_1(run)
    vlm = load(str(run), device="cpu")
    assert vlm.rank(images, QUESTIONS, asked) == before
    assert vlm.rank(images, QUESTIONS, asked, adapter="base") != before
    save_run(run, vlm.manifest, vlm.model)
    assert json.loads((run / MANIFEST).read_text())["format"] == FORMAT
    assert load(str(run), device="cpu").rank(images, QUESTIONS, asked) == before


def test_a_run_of_format_1_stays_one_when_its_metrics_are_written(run):
    in_format_1(run)
    manifest = read_manifest(run)
    manifest.metrics = {"exact_match": 1.0}
    write_manifest(run, manifest)
    content = json.loads((run / MANIFEST).read_text())
    assert (content["format"], content["metrics"]) == (1, {"exact_match": 1.0})
    assert not content.keys() & {*NEW_IN_FORMAT_2}
    load_run(run)


@pytest.mark.parametrize("content", ['{"format": 2', "[]", '{"format": 2, "x": 1}'])
def test_a_damaged_manifest_is_refused(run, content):
    (run / MANIFEST).write_text(content)
    with pytest.raises(RefusedError, match=MANIFEST):
        load_run(run)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("adapters", [1], r"mmpeft\.json: adapters is \[1\]; wanted list\[str\]"),
        ("metrics", {"loss": "low"}, "metrics is .*wanted"),
        ("answer_tokens", True, "answer_tokens is True; wanted int"),
        ("choices", {"default": []}, "choices is"),
        ("language", {"name": "x", "foo": 7}, "language has 'foo', which this version does not know"),
        ("language", {"name": "x", "dtype": "half"}, "language: dtype is 'half'; wanted Literal"),
        ("vision", {"name": 7}, "vision: name is 7; wanted str"),
        ("template", {}, r"has the template \{\}; wanted a layout of minigpt"),
        ("new", 1, "has 'new', which this version does not know"),
    ],
)
def test_a_manifest_that_was_edited_is_refused_by_field(run, field, value, message):
    content = json.loads((run / MANIFEST).read_text())
    (run / MANIFEST).write_text(json.dumps(content | {field: value}))
    with pytest.raises(RefusedError, match=message):
        load_run(run)


def test_finetunes_with_equal_projectors_share_a_slot_and_others_have_their_own(run, randomise):
    """Equal ones go through the plain product as alone, so that answers stay the same to the bit."""
    model, _, manifest = load_run(run)
    for name in ("second", "third"):
        model.bank.add(name, model.bank.entry("default").config)
    model.projector_slots = {"third": 1}
    grown = Projector(model.vision_encoder.dim, model.projector.weight.shape[1], 2)
    grown.fill(model.projector.tensors(0), 0)
    grown.fill({key: tensor + 1 for key, tensor in model.projector.tensors(0).items()}, 1)
    model.projector = grown
    save_run(run, manifest, model)
    again, _, _ = load_run(run)
    assert again.projector_slots == {"third": 1}
    for slot in (0, 1):
        assert torch.equal(again.projector.weight[slot], grown.weight[slot])


def test_a_truncated_projector_is_refused(run):
    path = adapter_folder(run, "default") / PROJECTOR
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"projector.safetensors"):
        load_run(run)


def test_an_adapter_that_is_gone_is_refused(run):
    (run / "adapters" / "default" / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"adapters/default/adapter_config.json is missing; put back"):
        load_run(run)


def test_a_finetune_that_is_gone_is_refused(run):
    shutil.rmtree(run / "adapters" / "default")
    with pytest.raises(ValueError, match=r"adapters/default/projector.safetensors is missing"):
        load_run(run)


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_files_of_a_run_may_be_read_like_any_new_file(tmp_path, tiny_base, tiny_data, mask):
    """Of a fit, its features, a test and a merge; libraries make some for their owner alone."""
    config = make_config(tmp_path / "config.yaml", tiny_base, tiny_data, trainer={"max_steps": 1})
    before = os.umask(mask)
    try:
        for command in ("fit", "test"):
            main([command, "--config", str(config)])
        main(["merge", str(tmp_path / "run")])
    finally:
        os.umask(before)
    written = [path for folder in ("run", "features") for path in (tmp_path / folder).rglob("*")]
    files = [path for path in written if path.is_file() and path.name not in (".lock", "lock")]
    assert len([path for path in files if path.suffix == ".safetensors"]) > 4
    modes = {str(path.relative_to(tmp_path)): oct(path.stat().st_mode & 0o777) for path in files}
    assert not {path: mode for path, mode in modes.items() if mode != oct(0o666 & ~mask)}


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is no run of mmpeft: it has no mmpeft.json"):
        load_run(tmp_path)


def test_a_newer_format_is_refused(run):
    path = run / MANIFEST
    path.write_text(path.read_text().replace(f'"format": {FORMAT}', '"format": 99'))
    with pytest.raises(ValueError, match="has format 99"):
        load_run(run)


@torch.no_grad()
def test_peft_alone_reads_the_adapter(tiny_run, tiny_base, tmp_path, randomise):
    model, template, manifest = load_run(tiny_run)
    randomise(model.bank, "default")
    save_run(tmp_path, manifest, model)
    record = {"id": "1", "images": [], "turns": [("is red a color?", None)], "task": None, "where": "here"}
    ids = torch.tensor([template.encode_prompt(record).ids])
    model.bank.route(["default"])
    ours = model.language_model.eval()(ids).logits

    plain = AutoModelForCausalLM.from_pretrained(tiny_base / "language", dtype=torch.float32)
    base = plain(ids).logits
    peft = PeftModel.from_pretrained(plain, tmp_path / "adapters" / "default").eval()
    torch.testing.assert_close(ours, peft(ids).logits, atol=1e-5, rtol=1e-5)
    assert (ours - base).abs().max() > 0.1


def test_a_run_of_many_finetunes_is_loaded_without_copying_stacks(run, monkeypatch):
    """Room is made for all of them before the first."""
    model, _, manifest = load_run(run)
    for number in range(5):
        model.bank.add(f"more{number}", LoraConfig(rank=2 + number, target_modules=["q_proj"]))
    model.bank.add("tfew", IA3Config())
    save_run(run, manifest, model)
    grown = []
    grow = stack._grown
    monkeypatch.setattr(stack, "_grown", lambda *args: grown.append(args) or grow(*args))
    again, *_ = load_run(run)
    assert not grown
    assert (again.bank.names, again.bank._num_slots) == (model.bank.names, model.bank._num_slots)
    assert all(
        torch.equal(tensor, again.bank.tensors(name)[key])
        for name in model.bank.names
        for key, tensor in model.bank.tensors(name).items()
    )

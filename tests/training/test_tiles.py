"""Runs under `model.vision.fit: tile`: tokens by an image's shape, the same in training and everywhere after it."""

import json
import re

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

import mmpeft
from mmpeft.cli import main
from mmpeft.data.images import ImageWorker
from mmpeft.data.template import IMAGE_TOKEN
from mmpeft.inference.live import LiveEngine
from mmpeft.inference.live_settings import LiveSettings
from tests.tiny import make_config, make_record, run_directory, write_jsonl

SIZES = {"wide": (300, 40), "tall": (40, 300), "small": (20, 12), "square": (90, 88)}
TOKENS = {"wide": 20, "tall": 20, "small": 4, "square": 20}
"""Of `test_vit` at 32 px: 4 of the overview, and those of the tiles."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Images of four shapes, as PNG and JPEG, one of them stored lying; two questions about each, and one about two."""
    folder = tmp_path_factory.mktemp("shapes")
    rng = np.random.default_rng(0)
    for name, (width, height) in SIZES.items():
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    lying, exif = Image.open(folder / "wide.png"), Image.Exif()
    exif[0x0112] = 6
    lying.save(folder / "tall.jpg", exif=exif)
    names = [f"{name}.png" for name in SIZES] + ["tall.jpg"]
    rows = [
        {"image": n, "question": q, "answer": a}
        for n in names
        for q, a in (("red?", "no"), ("what?", "noise"))
    ]
    rows.append({"images": ["small.png", "tall.jpg"], "question": "<image> like <image>?", "answer": "no"})
    for split in ("train", "val", "test"):
        write_jsonl(folder / f"{split}.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_base, data):
    folder = tmp_path_factory.mktemp("tiled")
    config = make_config(folder / "config.yaml", tiny_base, data)
    main(["fit", "--config", str(config), "--model.vision.fit=tile", "--trainer.max_steps=4"])
    return run_directory(config)


def weights(run):
    own = run / "adapters" / "default"
    return [load_file(own / name) for name in ("adapter_model.safetensors", "projector.safetensors")]


def test_the_manifest_says_how_images_are_cut(run):
    manifest = json.loads((run / "mmpeft.json").read_text())
    assert (manifest["vision"]["fit"], manifest["vision"]["max_tiles"]) == ("tile", 4)
    assert "grid of 2 to 4 tiles" in manifest["identity"]["vision"]["tiles"]


def test_a_fit_is_the_same_with_and_without_the_cache(run, tmp_path, tiny_base, data):
    config = make_config(tmp_path / "config.yaml", tiny_base, data)
    words = ["--model.vision.fit=tile", "--trainer.max_steps=4", "--data.cache.build=never"]
    main(["fit", "--config", str(config), *words])
    for cached, online in zip(weights(run), weights(run_directory(config)), strict=True):
        assert all((cached[name] == online[name]).all() for name in cached)
    assert not list((tmp_path / "features").rglob("*.safetensors"))


def test_training_and_inference_read_the_same_tokens(run, data):
    vlm = mmpeft.load(str(run))
    for name in ("wide.png", "tall.png", "small.png", "square.png", "tall.jpg"):
        record = make_record("what?", "noise", images=[str(data / name)], task="vqa")
        learnt, asked = vlm.template.encode(record), vlm.template.encode_prompt(record)
        assert learnt.ids[: len(asked.ids)] == asked.ids
        assert asked.ids.count(IMAGE_TOKEN) == TOKENS[name.split(".")[0]]
        for given in ((data / name).read_bytes(), Image.open(data / name)):
            assert vlm.template.encode_prompt(record | {"images": [given]}).ids == asked.ids


def test_answers_beside_images_of_other_shapes_are_those_of_each_alone(run, data):
    vlm = mmpeft.load(str(run))
    images = [str(data / name) for name in ("wide.png", "small.png", "tall.jpg")]
    asked = [*images, (images[1], images[0])]
    choices = ["no", "noise", "red"]
    together = vlm.rank(asked, "what?", choices)
    for image, scores in zip(asked, together, strict=True):
        assert dict(vlm.rank(image, "what?", choices)) == pytest.approx(dict(scores), abs=1e-4)
    assert len(vlm.caption(images, max_new_tokens=2)) == 3
    with ImageWorker() as worker:
        vlm.decode_by(worker.load)
        assert dict(vlm.rank(images[0], "what?", choices)) == pytest.approx(dict(together[0]), abs=1e-4)


def test_a_live_engine_answers_about_images_of_several_shapes(run, data):
    vlm = mmpeft.load(str(run))
    several = (str(data / "wide.png"), str(data / "small.png"))
    choices = ["no", "noise", "red"]
    written, _ = vlm.requests(several, "<image> like <image>?")
    picked, _ = vlm.requests(several, "what?", choices=choices)
    with LiveEngine(vlm.engine, LiveSettings(max_rows=4, max_columns=512, max_waiting=4)) as live:
        tickets = [live.submit(request) for request in (*written, *picked)]
        answer, ranking = (ticket.result(120) for ticket in tickets)
    assert answer.text == vlm.ask(several, "<image> like <image>?")
    assert dict(ranking.ranking(picked[0])) == pytest.approx(
        dict(vlm.rank(several, "what?", choices)), abs=1e-4
    )


def test_tests_captions_and_inspect_count_the_same(run, data, tmp_path, tiny_base, capsys):
    main(["test", "--run", str(run)])
    assert len((run / "predictions.jsonl").read_text().splitlines()) == 11
    out = tmp_path / "captions.jsonl"
    main(["caption", str(data), "--run", str(run), "--output", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [("caption" in row) for row in rows] == [True] * 5
    capsys.readouterr()
    config = make_config(tmp_path / "config.yaml", tiny_base, data)
    main(
        [
            "inspect",
            "--config",
            str(config),
            "--model.vision.fit=tile",
            "--rows=20",
            "--data.packing.batch_size=32",
        ]
    )
    found = {int(number) for number in re.findall(r"(\d+) image features", capsys.readouterr().out)}
    assert {4, 20} <= found


def test_a_run_is_not_asked_under_another_fit(run):
    with pytest.raises(SystemExit, match=r"model\.vision\.fit: trained with 'tile', found 'squash'"):
        main(["test", "--run", str(run), "--model.vision.fit=squash", "--model.vision.max_tiles=null"])


def test_check_counts_tokens_by_shape_and_warns_of_no_cut(data, tiny_base, capsys):
    words = ["check", str(data / "train.jsonl"), "--encoder", "test_vit", "--image_size", "32"]
    main([*words, "--language", str(tiny_base / "language"), "--fit", "tile"])
    tiled = capsys.readouterr().out
    assert "cut off" not in tiled
    assert "of each tile: an overview, then" in tiled
    assert "tokens, an image's by its shape" in tiled
    assert "<4 image features>" in tiled or "<20 image features>" in tiled
    main(words)
    assert "they are cut off; set model.vision.fit to pad, squash or tile" in capsys.readouterr().out


def test_check_tells_an_image_that_cannot_be_read_once(data, tmp_path, tiny_base):
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut")
    rows = [{"image": "bad.jpg", "question": "what?", "answer": "red"}]
    path = write_jsonl(tmp_path / "bad.jsonl", rows)
    words = ["--encoder", "test_vit", "--fit", "tile", "--language", str(tiny_base / "language")]
    for decode, told in (("true", "1 images cannot be used"), ("false", "1 problem(s)")):
        with pytest.raises(SystemExit) as caught:
            main(["check", str(path), "--decode", decode, *words])
        assert str(caught.value).count("bad.jpg'") == 1, decode
        assert told in str(caught.value)

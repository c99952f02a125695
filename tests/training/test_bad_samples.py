"""Training rows that are bad: refused with their place before what is expensive, or left out and counted by reason."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mmpeft.cli import main
from mmpeft.data.features import FeatureCache
from mmpeft.errors import RefusedError
from tests.tiny import make_config, run_directory, write_jsonl

CACHED, ONLINE = "--data.cache.build=always", "--data.cache.build=never"
SKIP = "--data.on_bad_sample=skip"
CUT, LONG, MISSING, INVALID = "cut", "long", "missing", "invalid"
BAD = {
    CUT: {"image": "cut.png", "question": "what?", "answer": "grey"},
    LONG: {"image": "red.png", "question": "what " * 300, "answer": "red"},
    MISSING: {"image": "none.png", "question": "what?", "answer": "red"},
    INVALID: {"image": "red.png", "question": "what?"},
}
REASONS = {
    CUT: "1 of images that cannot be decoded",
    LONG: "1 too long, or not fit for the template",
    MISSING: "1 without an image's file",
    INVALID: "1 not valid",
}


@pytest.fixture
def folder(tmp_path, tiny_data):
    """Good rows about two images, and a damaged image that no row names yet."""
    for colour in ("red", "blue"):
        shutil.copy(tiny_data / "images" / f"{colour}0.png", tmp_path / f"{colour}.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "red.png").read_bytes()[:-40])
    good = [
        {"image": f"{colour}.png", "question": question, "answer": answer}
        for colour in ("red", "blue")
        for question, answer in (
            ("what color is it?", colour),
            ("is it red?", "yes" if colour == "red" else "no"),
        )
    ]
    write_jsonl(tmp_path / "good.jsonl", good * 3)
    return tmp_path


def config_of(folder, base, *kinds, good=None, **data):
    """A config whose training rows have one bad one of each kind among them."""
    rows = [json.loads(line) for line in (folder / "good.jsonl").read_text().splitlines()]
    for number, kind in enumerate(kinds):
        rows.insert(2 + 2 * number, BAD[kind])
    write_jsonl(folder / "train.jsonl", rows)
    own = {split: str(folder / "good.jsonl") for split in ("val", "test")}
    own |= {"train": str(folder / "train.jsonl"), "packing": {"batch_size": 3, "max_length": 120}}
    return make_config(folder / "config.yaml", base, folder, data=own | data, trainer={"max_steps": 6})


def fit(config, *words, name="run"):
    run = config.parent / name
    main(["fit", "--config", str(config), f"--trainer.default_root_dir={run}", *words])
    return run


def same_weights(one, other):
    for name in ("adapter_model.safetensors", "projector.safetensors"):
        own, theirs = (load_file(run / "adapters" / "default" / name) for run in (one, other))
        assert all(torch.equal(own[key], theirs[key]) for key in own)


@pytest.mark.parametrize("build", [CACHED, ONLINE])
def test_an_image_that_cannot_be_decoded_is_refused_with_its_row(folder, tiny_base, build):
    config = config_of(folder, tiny_base, CUT)
    with pytest.raises((SystemExit, RefusedError), match=r"train\.jsonl:3 \(id 'train-3'\): .*cut\.png"):
        fit(config, build)


def test_a_row_that_is_too_long_is_refused_before_images_are_encoded(folder, tiny_base, monkeypatch):
    config = config_of(folder, tiny_base, LONG)
    monkeypatch.setattr(FeatureCache, "build", lambda *_, **__: pytest.fail("images are encoded first"))
    with pytest.raises(SystemExit, match=r"train\.jsonl:3 .*first answer starts beyond max_length = 120"):
        fit(config)


@pytest.mark.parametrize(
    ("kinds", "build"), [((LONG,), CACHED), (tuple(BAD), CACHED), (tuple(BAD), ONLINE)], ids=str
)
def test_what_is_skipped_is_counted_by_reason_and_the_others_train_as_if_alone(
    folder, tiny_base, capsys, kinds, build
):
    alone = fit(config_of(folder, tiny_base), build, name="alone")
    run = fit(config_of(folder, tiny_base, *kinds), SKIP, build)
    same_weights(run, alone)
    told = json.loads((run / "mmpeft.json").read_text())["facts"]["skipped"]
    assert told.startswith(f"of the training data {len(kinds)} bad rows: ")
    assert all(REASONS[kind] in told for kind in kinds)
    assert told in (run / "README.md").read_text()
    err = capsys.readouterr().err
    for kind in kinds:
        count, reason = REASONS[kind].split(" ", 1)
        assert (
            f"train: {count} bad rows skipped (data.on_bad_sample): {reason}, the first: train.jsonl:" in err
        )


def test_resumed_with_skipped_rows_equals_uninterrupted(folder, tiny_base):
    config = config_of(folder, tiny_base, CUT, LONG, INVALID)
    words = [SKIP, ONLINE, "--model.schedule=constant", "--model.warmup=0"]
    whole = fit(config, *words, name="whole")
    part = fit(config, *words, "--trainer.max_steps=2", name="part")
    resumed = fit(config, *words, f"--ckpt_path={part}/checkpoints/last.ckpt", name="part")
    same_weights(resumed, whole)
    assert "3 bad rows" in json.loads((resumed / "mmpeft.json").read_text())["facts"]["skipped"]


def test_a_mended_image_is_other_data(folder, tiny_base):
    config = config_of(folder, tiny_base, CUT)
    run = fit(config, SKIP, "--trainer.max_steps=2")
    shutil.copy(folder / "blue.png", folder / "cut.png")
    with pytest.raises(SystemExit, match="the checkpoint does not fit this run"):
        fit(config, SKIP, f"--ckpt_path={run}/checkpoints/last.ckpt")


def test_held_out_images_are_never_skipped(folder, tiny_base):
    rows = (folder / "good.jsonl").read_text()
    (folder / "val.jsonl").write_text(rows + json.dumps(BAD[CUT]) + "\n")
    config = config_of(folder, tiny_base, val=str(folder / "val.jsonl"))
    with pytest.raises(SystemExit, match=r"val\.jsonl:13 .*cut\.png"):
        fit(config, SKIP)


def test_a_file_of_bad_rows_alone_is_an_error(folder, tiny_base):
    write_jsonl(folder / "bad.jsonl", [BAD[CUT]] * 2)
    config = config_of(folder, tiny_base, train=str(folder / "bad.jsonl"))
    with pytest.raises(SystemExit, match=r"all 2 rows are bad; bad\.jsonl:1 .*cut\.png"):
        fit(config, SKIP)
    write_jsonl(folder / "bad.jsonl", [BAD[LONG]] * 2)
    with pytest.raises(SystemExit, match=r"train: 2 problem\(s\)"):
        fit(config, SKIP)


def test_what_shots_have_drawn_is_refused(folder, tiny_base):
    """To leave it out would train on fewer shots than were asked for."""
    config = config_of(folder, tiny_base, CUT, shots=1)
    with pytest.raises(SystemExit, match=r"train\.jsonl:3 .*cut\.png"):
        fit(config, SKIP)


def test_files_keep_their_weights_and_finetunes_share_what_was_left_out(folder, tiny_base, capsys):
    config_of(folder, tiny_base, CUT, LONG)
    files = [str(folder / "train.jsonl"), str(folder / "good.jsonl")]
    settings = {"train": files, "weights": [1.0, 3.0]}
    lora = {"class_path": "mmpeft.adapters.LoraConfig", "init_args": {"rank": 2}}
    two = {name: {"adapter": lora} for name in ("one", "two")}

    def joint(name, train):
        own = {"val": None, "test": None, "packing": {"batch_size": 3, "max_length": 120}}
        config = make_config(
            folder / f"{name}.yaml",
            tiny_base,
            folder,
            data=own | settings | {"train": train},
            model={"adapter": None, "adapters": two},
            trainer={"max_steps": 6, "limit_val_batches": 0, "default_root_dir": str(folder / name)},
        )
        main(["fit", "--config", str(config), SKIP])
        return run_directory(config)

    mixed, alone = joint("mixed", files), joint("alone", [files[1]] * 2)
    for name in ("one", "two"):
        own, theirs = (
            load_file(run / "adapters" / name / "adapter_model.safetensors") for run in (mixed, alone)
        )
        assert all(torch.equal(own[key], theirs[key]) for key in own)
    told = json.loads((mixed / "mmpeft.json").read_text())["facts"]["skipped"]
    assert told.startswith("of the training data 2 bad rows: "), "once, however many finetunes read them"


def test_under_tile_a_header_that_cannot_be_read_is_told_with_its_row(folder, tiny_base):
    (folder / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    config = config_of(folder, tiny_base, CUT)
    with pytest.raises(SystemExit, match=r"train\.jsonl:3 \(id 'train-3'\): .*cut\.png"):
        fit(config, "--model.vision.fit=tile")
    run = fit(config, "--model.vision.fit=tile", SKIP)
    assert (
        "1 of images that cannot be decoded"
        in json.loads((run / "mmpeft.json").read_text())["facts"]["skipped"]
    )


def test_images_are_looked_at_once(folder, tmp_path, monkeypatch):
    from tests.data.counting_encoder import CountingEncoder

    images = [str(folder / f"{name}.png") for name in ("red", "cut", "blue", "none")]
    cache = FeatureCache(tmp_path / "cache", encoder := CountingEncoder())
    assert set(cache.undecodable(images * 3)) == {images[1], images[3]}
    assert encoder.encoded == 2, "each of the good ones"
    cache.build(images, skip_unreadable=True)
    before = encoder.encoded
    assert set(cache.undecodable(images * 3)) == {images[1], images[3]}
    assert encoder.encoded == before, "what has features need not be decoded"
    bad = (folder / "cut.png").read_bytes()
    assert set(cache.undecodable([bad, Image.open(images[0]).tobytes()])) >= {bad}

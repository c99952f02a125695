"""Tests of the data sets about easy-VQA's images, on a small easy-VQA, and of the German rules on all templates."""

import itertools
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from mmpeft.data.sources import check_images, load_records
from mmpeft.samples import easy_vqa_german as german
from mmpeft.samples.easy_vqa import COLORS, SHAPES
from mmpeft.samples.easy_vqa_views import build_german, build_shapes
from mmpeft.samples.rows import conversation, read_rows, write_rows
from mmpeft.samples.sample import PrepareError

ASKED = [
    ("what is the red shape?", "circle"),
    ("what shape is present?", "circle"),
    ("is no circle present?", "no"),
    ("what color is the shape?", "red"),
]
ANSWERS = {"yes", "no"} | COLORS | SHAPES


@pytest.fixture
def root(tmp_path) -> Path:
    """An `embedded` folder with an easy-VQA of two images a split."""
    folder = tmp_path / "embedded" / "easy-vqa"
    for split, source in (("train", "train"), ("val", "train"), ("test", "test")):
        (folder / "images" / source).mkdir(parents=True, exist_ok=True)
        rows = []
        for image, (number, (asked, answer)) in itertools.product((0, 1), enumerate(ASKED)):
            name = f"images/{source}/{split}{image}.png"
            Image.new("RGB", (4, 4)).save(folder / name)
            rows.append(conversation(f"{split}-{image}{number}", "vqa", asked, answer, image=name))
        write_rows(folder / f"{split}.jsonl", rows)
    (folder / "PACKAGE-LICENSE.txt").write_text("licence")
    return tmp_path / "embedded"


def build(root: Path, builder) -> dict[str, list[dict]]:
    """Rows by split of a set, once every file of it was read and every image found."""
    folder = root / "made"
    folder.mkdir()
    builder(root, folder)
    assert (folder / "PACKAGE-LICENSE.txt").read_text() == "licence"
    for path in folder.glob("*.jsonl"):
        records = load_records(path)
        assert not check_images(records, decode=True)
        assert all(len(record["images"]) == 1 for record in records)
    return {path.stem: read_rows(path) for path in folder.glob("*.jsonl")}


def test_the_shape_questions_have_the_shapes_as_choices_and_one_for_each_test_image(root):
    splits = build(root, build_shapes)
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 4, "val": 4, "test": 2}
    for rows in splits.values():
        for row in rows:
            assert row["choices"] == ["circle", "rectangle", "triangle"]
            assert row["conversations"][1]["value"] in row["choices"]
    assert len({row["image"] for row in splits["test"]}) == 2


def test_the_german_set_has_the_same_images_and_other_ids(root):
    splits = build(root, build_german)
    for split, rows in splits.items():
        english = read_rows(root / "easy-vqa" / f"{split}.jsonl")
        assert [row["id"] for row in rows] == [f"{row['id']}-de" for row in english]
        assert [row["image"] for row in rows] == [row["image"] for row in english]
        assert rows[0]["conversations"] == [
            {"from": "human", "value": "<image>\nWas ist die rote Form?"},
            {"from": "gpt", "value": "Kreis"},
        ]


def test_images_are_linked_not_copied_where_the_file_system_can(root, monkeypatch):
    build(root, build_shapes)
    image = "images/test/test0.png"
    assert (root / "made" / image).samefile(root / "easy-vqa" / image)


def test_images_are_copied_where_it_cannot(root, monkeypatch):
    def refuse(*_):
        raise OSError("links are not supported")

    monkeypatch.setattr("mmpeft.samples.easy_vqa_views.os.link", refuse)
    build(root, build_shapes)
    image = "images/test/test0.png"
    assert not (root / "made" / image).samefile(root / "easy-vqa" / image)
    assert (root / "made" / image).read_bytes() == (root / "easy-vqa" / image).read_bytes()


GERMAN = [
    ("what color is the circle?", "gray", "Welche Farbe hat der Kreis?", "grau"),
    ("what color is the rectangle?", "teal", "Welche Farbe hat das Rechteck?", "türkis"),
    ("what is the color of the triangle?", "green", "Was ist die Farbe des Dreiecks?", "grün"),
    ("what is the teal shape?", "rectangle", "Was ist die türkisfarbene Form?", "Rechteck"),
    ("is a circle present?", "yes", "Ist ein Kreis vorhanden?", "ja"),
    ("is there a circle?", "yes", "Gibt es einen Kreis?", "ja"),
    ("is there a triangle in the image?", "no", "Gibt es im Bild ein Dreieck?", "nein"),
    ("is there not a circle?", "no", "Stimmt es, dass es keinen Kreis gibt?", "nein"),
    ("is no circle present?", "yes", "Stimmt es, dass kein Kreis vorhanden ist?", "ja"),
    (
        "does the image not contain a brown shape?",
        "yes",
        "Stimmt es, dass das Bild keine braune Form enthält?",
        "ja",
    ),
    ("what shape does the image contain?", "circle", "Welche Form enthält das Bild?", "Kreis"),
]


@pytest.mark.parametrize(("question", "answer", "asked", "said"), GERMAN)
def test_articles_cases_and_endings(question, answer, asked, said):
    assert german.translate(question, answer) == (asked, said)


def fill(template: str) -> list[str]:
    """All questions of an English template."""
    pairs = itertools.product(sorted(COLORS), sorted(SHAPES))
    return sorted({template.replace("COLOR", color).replace("SHAPE", shape) for color, shape in pairs})


def test_different_questions_stay_different_and_every_word_is_translated():
    english = [question for template in german.TEMPLATES for question in fill(template)]
    asked = [german.translate(question, "yes")[0] for question in english]
    assert len(english) == len(set(english)) == 107
    assert len(set(asked)) == 107
    for text in asked:
        assert re.fullmatch(r"[A-ZÄÖÜ][a-zA-Zäöüß, ]+\?", text)
        assert not set(re.findall(r"\w+", text)) & (COLORS | SHAPES | {"shape", "the", "is", "image"})
    assert len({german.translate("is there a circle?", answer)[1] for answer in ANSWERS}) == 13


def test_a_negated_question_keeps_its_sense():
    for template in german.TEMPLATES:
        for question in fill(template):
            negated = bool({"no", "not"} & set(question.split()))
            asked, _ = german.translate(question, "yes")
            assert asked.startswith("Stimmt es, dass ") == negated == (" kein" in asked)


def test_what_no_rule_covers_is_an_error():
    with pytest.raises(PrepareError, match=r"no German rule for the question 'how many circles are there\?'"):
        german.translate("how many circles are there?", "one")
    with pytest.raises(PrepareError, match=r"no German word for the answer 'purple'"):
        german.translate("what color is the shape?", "purple")


def test_letters_are_written_as_they_are(root):
    build(root, build_german)
    text = (root / "made" / "test.jsonl").read_text(encoding="utf-8")
    assert "\\u" not in text
    assert json.loads(text.splitlines()[2])["conversations"][1]["value"] == "nein"

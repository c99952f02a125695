"""The examples of a run, as the demo asks them again: what was read, or not at all."""

import json

import pytest
from PIL import Image

from mmpeft.data.images import ImageConfig
from mmpeft.demo.about import read_examples
from mmpeft.evaluation.examples import write_examples
from tests.tiny import make_record

RED, BLUE = Image.new("RGB", (8, 6), "red"), Image.new("RGB", (8, 6), "blue")


@pytest.fixture
def examples(tmp_path):
    """What the demo has of some records."""

    def of(*records):
        write_examples(tmp_path, records, dict.fromkeys(range(len(records)), "an answer"), ImageConfig())
        return read_examples([tmp_path])

    return of


def test_all_images_of_a_question_are_asked_about(examples):
    first, second, third = examples(
        make_record("which is red?", images=[RED, BLUE]),
        make_record("<image> or <image>?", images=[BLUE, RED]),
        make_record("is <image> red?", images=[RED]),
    )
    assert [own.question for own in (first, second, third)] == [
        "which is red?",
        "<image> or <image>?",
        "is <image> red?",
    ]
    colours = [[each.image.getpixel((0, 0)) for each in own.images] for own in (first, second, third)]
    red, blue = (255, 0, 0), (0, 0, 255)
    assert colours == [[red, blue], [blue, red], [red]]


def test_what_the_page_cannot_ask_alike_is_left_out(examples, tmp_path):
    turns = [("<image>what?", "red"), ("sure?", "yes")]
    kept = examples(
        make_record("what?", images=[RED]),
        make_record(images=[RED]) | {"turns": turns},
        make_record("who?", images=[RED], system="You are a pirate."),
        make_record("when?", images=[RED], times=[1.5]),
        make_record("text alone?"),
    )
    assert [own.question for own in kept] == ["what?"]
    rows = [json.loads(line) for line in (tmp_path / "examples" / "examples.jsonl").read_text().splitlines()]
    assert [row["alone"] for row in rows] == [True, False, False, False, True]


def test_they_are_spread_over_all_that_was_answered(examples):
    shown = [own.question for own in examples(*(make_record(str(n), images=[RED]) for n in range(23)))]
    assert len(shown) == 12
    assert (shown[0], shown[1], shown[-1]) == ("0", "1", "21")
    assert sum(int(question) > 11 for question in shown) == 5


def test_files_of_earlier_runs_are_read(examples, tmp_path):
    examples(make_record("what?", images=[RED]))
    path = tmp_path / "examples" / "examples.jsonl"
    row = json.loads(path.read_text())
    path.write_text(json.dumps({key: row[key] for key in ("image", "question", "task", "truth", "answer")}))
    (own,) = read_examples([tmp_path])
    assert (own.question, len(own.images)) == ("what?", 1)
    assert own.images[0].name == str(tmp_path / "examples" / "00.png")

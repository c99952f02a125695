"""Answers survive a kill, and only those of the same model to the same questions."""

import pytest

from mmpeft.data.shares import Share
from mmpeft.evaluation.answer_log import AnswerLog
from mmpeft.inference.requests import Completion

ANSWERS = [
    (0, Completion("red")),
    (3, Completion("blue", [-0.1, -2.0], -0.3, 2)),
    (1, Completion("two\nlines")),
]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "test.partial.jsonl"


def test_an_evaluation_goes_on_but_for_the_last_line(path):
    AnswerLog(path, "a model").append(ANSWERS)
    again = AnswerLog(path, "a model")
    assert again.answers == dict(ANSWERS[:2])
    again.append(ANSWERS[2:])
    again.append([(5, Completion("last"))])
    assert AnswerLog(path, "a model").answers == dict(ANSWERS)


def test_half_a_line_is_left_out(path):
    AnswerLog(path, "a model").append(ANSWERS)
    path.write_text(path.read_text()[:-20])
    assert AnswerLog(path, "a model").answers == dict(ANSWERS[:2])


def test_answers_of_another_model_are_not_taken(path):
    AnswerLog(path, "a model").append(ANSWERS)
    other = AnswerLog(path, "another model")
    assert other.answers == {}
    assert AnswerLog(path, "a model").answers == {}


@pytest.mark.parametrize("content", ["", "no json\n", '{"belongs_to": "a mod'])
def test_a_damaged_beginning_begins_anew(path, content):
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert AnswerLog(path, "a model").answers == {}


def test_nothing_is_left_when_all_is_answered(path):
    log = AnswerLog(path, "a model")
    log.append(ANSWERS)
    log.discard()
    assert not path.exists()


def test_a_damaged_line_is_asked_again(path):
    AnswerLog(path, "a model").append((number, Completion(str(number))) for number in range(4))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], b"\xff\0\0\n", b"7\n", *lines[3:]]))
    assert list(AnswerLog(path, "a model").answers) == [2]


def test_answers_of_several_processes_are_joined_and_found_again_by_any_number(path):
    first, second = (AnswerLog(path, "a model", Share(rank, 2)) for rank in range(2))
    first.append(ANSWERS[:2])
    second.append(ANSWERS[2:])
    second.append([(5, Completion("last"))])
    assert first.answers == dict(ANSWERS[:2])
    first.join()
    assert first.answers == dict([*ANSWERS, (5, Completion("last"))])
    # killed, and begun again by one process: each file's last line may be half an answer
    again = AnswerLog(path, "a model")
    assert again.answers == dict([ANSWERS[0], ANSWERS[2]])
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    AnswerLog(path, "a model", Share(1, 2)).append(ANSWERS[1:2])
    AnswerLog(path, "a model", Share(0, 2)).discard()
    assert not list(path.parent.iterdir())

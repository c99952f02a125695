"""A question that goes on with a conversation: the prompt is the one that training would have made of it."""

import re

import pytest

from mmpeft.errors import RefusedError
from mmpeft.inference.requests import Request
from tests.tiny import make_record

QUESTION, HISTORY = "sure?", [("what color is it?", "red"), ("is it blue?", "no")]


def test_the_prompt_is_the_conversations(vlm, images):
    asked = vlm.requests((images[0], images[1]), QUESTION, "other", history=HISTORY)[0][0]
    (first, answer), *rest = HISTORY
    turns = [("<image><image>" + first, answer), *rest, (QUESTION, None)]
    record = make_record(images=images[:2]) | {"turns": turns, "task": vlm.manifest.default_task}
    same = Request(record, "other", sampling=asked.sampling)
    assert vlm.engine.encode(asked).ids == vlm.engine.encode(same).ids
    answer = vlm.ask((images[0], images[1]), QUESTION, "other", history=HISTORY)
    assert answer == vlm.answer([same])[0].text
    assert answer != vlm.ask((images[0], images[1]), QUESTION, "other")


def test_images_stand_in_the_first_question(vlm, images):
    marked = [("is <image> red?", "yes"), *HISTORY]
    (request,), _ = vlm.requests(images[0], QUESTION, history=marked)
    assert [question for question, _ in request.record["turns"]] == [*(q for q, _ in marked), QUESTION]


def test_choices_are_ranked_behind_it(vlm, images):
    choices = ["red", "blue"]
    (request,), _ = vlm.requests(images[0], QUESTION, "tfew", choices=choices, history=HISTORY)
    (found,), (alone,) = (
        vlm.answer([request]),
        vlm.answer(vlm.requests(images[0], QUESTION, "tfew", choices=choices)[0]),
    )
    assert found.text == vlm.ask(images[0], QUESTION, "tfew", choices=choices, history=HISTORY)
    assert found.scores != alone.scores


@pytest.mark.parametrize(
    ("history", "told"),
    [
        ([("what?", "")], "turn 1 of the history is ('what?', '')"),
        ([("what?", "red"), ("sure?",)], "turn 2 of the history is ('sure?',)"),
        ([("what?", "<image>")], "<image> may stand in the first question of a conversation alone"),
        ([("what?", "red"), ("<image>?", "red")], "may stand in the first question of a conversation alone"),
        ([("<image><image>", "red")], "has 2 <image> but 1 images were given"),
    ],
)
def test_what_is_no_conversation_is_refused(vlm, images, history, told):
    with pytest.raises(RefusedError, match=re.escape(told)):
        vlm.ask(images[0], QUESTION, history=history)


def test_a_history_is_of_one_question(vlm, images):
    with pytest.raises(RefusedError, match="a history goes with one question"):
        vlm.ask(images[:2], QUESTION, history=HISTORY)

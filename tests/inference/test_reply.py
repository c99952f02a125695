"""A reply: choices that the run knows are ranked, others written, and what the answer does not say is told."""

import shlex
from typing import Any

import pytest

from mmpeft.cli import main
from mmpeft.errors import RefusedError
from mmpeft.inference.reply import reply
from mmpeft.inference.requests import Completion

QUESTION, COLOURS = "what color is it?", ["red", "blue", "a green square"]


@pytest.fixture
def knows(vlm, monkeypatch):
    """Says what the finetune "tfew" was trained to choose among."""

    def run(known: dict) -> None:
        monkeypatch.setattr(vlm.manifest, "choices", {"tfew": {"vqa": known}})

    return run


def test_known_choices_are_ranked_unless_writing_is_asked_for(vlm, images, knows):
    written = vlm.ask(images[0], QUESTION, "tfew", 6)
    knows({"": COLOURS})
    best = vlm.rank(images[0], QUESTION, COLOURS, "tfew")[0][0]
    assert vlm.ask(images[0], QUESTION, "tfew") == best != written
    assert vlm.ask(images[0], QUESTION, "tfew", 6, answer_by="generate") == written
    assert vlm.ask([images[0]], QUESTION, "tfew", answer_by="rank") == [best]
    assert "".join(vlm.stream(images[0], QUESTION, "tfew", max_new_tokens=6)) == written


def test_each_finetune_answers_as_it_was_trained(vlm, images, knows):
    names = ["default", "tfew", "base"]
    written = vlm.ask(images[0], QUESTION, names, 6)
    knows({"": COLOURS})
    default, chosen, base = vlm.ask(images[0], QUESTION, names, 6)
    assert (default, base) == (written[0], written[2])
    assert chosen in COLOURS


def test_captions_that_were_chosen_are_chosen(vlm, images, monkeypatch):
    monkeypatch.setattr(vlm.manifest, "choices", {"default": {"caption": {"": ["a red square", "nothing"]}}})
    assert vlm.caption(images[0]) in ("a red square", "nothing")
    assert vlm.ask(images[0], QUESTION, max_new_tokens=2) not in ("a red square", "nothing")


def test_given_choices_are_ranked_by_any_finetune(vlm, images):
    for name in ("default", "base"):
        found = reply(vlm, images[0], QUESTION, name, choices=COLOURS)
        assert found.ranking == vlm.rank(images[0], QUESTION, COLOURS, name)
        assert found.text == found.ranking[0][0] == vlm.ask(images[0], QUESTION, name, choices=COLOURS)
        assert found.remarks == []
    assert vlm.ask(images[:2], QUESTION, choices=[["red", "blue"], COLOURS[1:]])[1] in COLOURS[1:]


def test_ranking_and_writing_at_once_is_refused(vlm, images):
    with pytest.raises(RefusedError, match='answer_by is "generate": leave one of them out'):
        vlm.ask(images[0], QUESTION, choices=COLOURS, answer_by="generate")
    with pytest.raises(RefusedError, match="the question: no choices are known"):
        vlm.ask(images[0], QUESTION, answer_by="rank")


def test_a_finetune_that_chooses_says_when_it_has_nothing_to_choose_from(vlm, images, knows):
    knows({"what shape is it?": ["circle", "square"], "is it red?": []})
    (told,) = reply(vlm, images[0], QUESTION, "tfew", prefix="--").remarks
    assert "tfew was trained to choose" in told
    assert "--choices red,green,blue" in told
    usual: dict[str, Any] = {"question": QUESTION, "adapter": "tfew"}
    others: list[dict[str, Any]] = [
        {"question": "what shape is it?"},
        {"question": "is it red?"},
        {"answer_by": "generate"},
        {"choices": COLOURS},
        {"adapter": "default"},
    ]
    for asked in others:
        assert not reply(vlm, images[0], **usual | asked).remarks, asked


def test_choices_that_any_question_gets_are_told_as_such(vlm, images, knows):
    knows({"": COLOURS})
    (told,) = reply(vlm, images[0], "who is there?", "tfew", prefix="--").remarks
    assert told == (
        "tfew chose among the answers that its training data listed for every question: red, blue, a green square; "
        "--choices gives others, --answer_by generate lets it write"
    )
    assert not reply(vlm, images[0], "who is there?", "tfew", choices=COLOURS).remarks
    knows({"": [str(number) for number in range(11)]})
    assert "5, 6, 7 and 3 more;" in reply(vlm, images[0], QUESTION, "tfew").remarks[0]


def test_a_model_of_images_says_that_it_was_asked_without(vlm, images, monkeypatch):
    for name in (*vlm.adapters, "base"):
        for choices in (None, COLOURS):
            told = reply(vlm, None, QUESTION, name, choices=choices, prefix="--").remarks
            assert told == ["no --image: asked about text alone"]
    monkeypatch.setattr(vlm.manifest, "without_images", ["other"])
    assert reply(vlm, None, QUESTION, "other").remarks == []
    monkeypatch.setattr(vlm.manifest, "vision", None)
    assert reply(vlm, None, QUESTION, "default").remarks == []


@pytest.mark.parametrize(("name", "who"), [("base", "the base"), ("other", "other")])
def test_an_answer_without_a_word_says_so(vlm, images, monkeypatch, name, who):
    monkeypatch.setattr(vlm.engine, "answer", lambda requests: [Completion("") for _ in requests])
    assert vlm.ask(images[0], QUESTION, name) == ""
    found = reply(vlm, images[0], QUESTION, name)
    assert (found.text, found.remarks) == ("", [f"{who} ended its answer at once: it wrote nothing"])


def test_the_command_line_prints_the_answer_alone(tiny_run, images, capsys):
    asked = ["ask", QUESTION, "--run", str(tiny_run)]
    main([*asked, "--image", images[0], "--choices", "yes,no"])
    out, err = capsys.readouterr()
    assert out in ("yes\n", "no\n")
    assert "text alone" not in err
    main([*asked, "--max_new_tokens=2"])
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    assert "no --image: asked about text alone\n" in err
    main([*asked, "--choices", "yes,no", "--answer_by=rank"])
    assert "no --image: asked about text alone\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--choices red", "--choices: choices must be at least two"),
        ("--max_new_tokens 0", "max_new_tokens is 0; it must be at least 1"),
        ("--max_new_tokens -5", "max_new_tokens is -5"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_loaded(tiny_run, monkeypatch, options, message):
    monkeypatch.setattr("mmpeft.inference.vlm.load_run", None)
    with pytest.raises(SystemExit, match=message):
        main(["ask", QUESTION, "--run", str(tiny_run), *shlex.split(options)])

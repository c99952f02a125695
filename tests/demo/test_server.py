"""The demo's page before a real server."""

from itertools import pairwise

import pytest

import mmpeft
from mmpeft.cli import main
from mmpeft.serving.client import Server
from tests.demo.conftest import asking, opened
from tests.serving.conftest import running

gradio = pytest.importorskip("gradio")
client = pytest.importorskip("gradio_client")

from mmpeft.demo import asked as asking_module  # noqa: E402
from mmpeft.demo.of_server import OfServer  # noqa: E402

QUESTION = "what color is it?"


@pytest.fixture(scope="module")
def address(tiny_run):
    with running(tiny_run) as served, opened(OfServer(Server(served.address))) as url:
        yield url


@pytest.fixture(scope="module")
def vlm(tiny_run):
    return mmpeft.load(str(tiny_run), "cpu")


def test_answers_are_the_runs_side_by_side_and_come_in_pieces(page, vlm, red, monkeypatch):
    monkeypatch.setattr(asking_module, "PAUSE", 0.0)
    job = page.submit(*asking(red, finetunes=["default", "base"]), api_name="/answer")
    answers, *_ = job.result()
    assert [own["text"] for own in answers] == vlm.ask(
        red, QUESTION, ["default", "base"], answer_by="generate"
    )
    assert [own["error"] for own in answers] == [None, None]
    pieces = [[own["text"] for own in each] for each, *_ in job.outputs()]
    assert len(pieces) > 3
    for texts in zip(*pieces, strict=True):
        assert all(later.startswith(earlier) for earlier, later in pairwise(texts))


def test_choices_are_ranked(ask, vlm, red):
    (answer,) = ask(red, choices="red, blue,green")
    expected = vlm.rank(red, QUESTION, ["red", "blue", "green"])
    assert answer["text"] == expected[0][0]
    assert [choice for choice, _ in answer["ranking"]] == [choice for choice, _ in expected]


def test_several_images_and_a_conversation(ask, vlm, red, blue):
    how = {"answer_by": "generate"}
    first = ask(red, blue)[0]["text"]
    assert first == vlm.ask((red, blue), QUESTION, **how)
    (answer,) = ask(red, blue, question="sure?", remember=True)
    assert answer["text"] == vlm.ask((red, blue), "sure?", history=[(QUESTION, first)], **how)


def test_an_unreadable_file_is_named(ask, red, tmp_path):
    (tmp_path / "cut.png").write_bytes(red.read_bytes()[:60])
    (answer,) = ask(red, tmp_path / "cut.png")
    assert "cut.png" in answer["error"]
    assert "messages[0]" not in answer["error"]


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"question": " "}, "type a question"),
        ({"choices": "red"}, "at least two different"),
        ({"task": "Caption"}, "ask for a description"),
    ],
)
def test_what_cannot_be_asked_is_told(ask, red, how, told):
    with pytest.raises(client.exceptions.AppError, match=told):
        ask(red, **how)


@pytest.mark.parametrize(
    ("how", "told"),
    [
        (["--server", "http://127.0.0.1:9"], "cannot be reached"),
        (["--server", "http://127.0.0.1:9", "--run", "runs/mine"], "both say whom to ask"),
        (["--api_key", "sk"], "there is no --server"),
    ],
)
def test_a_server_that_cannot_be_asked_is_told(how, told):
    with pytest.raises(SystemExit, match=f"error: .*{told}"):
        main(["demo", *how])

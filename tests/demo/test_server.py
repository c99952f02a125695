"""demo/app.py --server: the real page before a real server."""

from itertools import pairwise

import pytest

import mmpeft
from mmpeft.serving.client import Server
from tests.serving.conftest import running

gradio = pytest.importorskip("gradio")
client = pytest.importorskip("gradio_client")

from demo.app import LAUNCH, build, main, of_server  # noqa: E402


@pytest.fixture(scope="module")
def page(tiny_run):
    with running(tiny_run) as served:
        blocks = build(of_server(Server(served.address)))
        _, url, _ = blocks.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, **LAUNCH)
        yield client.Client(url, verbose=False)
        blocks.close()


@pytest.fixture(scope="module")
def vlm(tiny_run):
    return mmpeft.load(str(tiny_run), "cpu")


@pytest.fixture
def red(tiny_data):
    return tiny_data / "images" / "red0.png"


def begin(page, image, question="what color is it?", finetune="default", choices=""):
    image = client.handle_file(str(image)) if image else None
    return page.submit(image, "Question", question, finetune, choices, api_name="/answer")


@pytest.mark.parametrize("finetune", ["default", "base"])
def test_the_answer_is_the_runs_and_comes_in_pieces(page, vlm, red, finetune):
    job = begin(page, red, finetune=finetune)
    _, seconds, ranking = job.result()
    pieces = [text for text, _, _ in job.outputs()]
    assert pieces[-1] == vlm.ask(red, "what color is it?", finetune, answer_by="generate")
    assert all(later.startswith(earlier) for earlier, later in pairwise(pieces))
    assert seconds.endswith(" s")
    assert ranking == ""


def test_choices_are_ranked(page, vlm, red):
    answer, _, ranking = begin(page, red, choices="red, blue,green").result()
    expected = vlm.rank(red, "what color is it?", ["red", "blue", "green"])
    assert answer == expected[0][0]
    assert [line.split()[0] for line in ranking.splitlines()] == [choice for choice, _ in expected]


@pytest.mark.parametrize(
    ("how", "told"), [({"question": " "}, "type a question"), ({"choices": "red"}, "at least two different")]
)
def test_what_cannot_be_asked_is_told(page, red, how, told):
    with pytest.raises(Exception, match=told):
        begin(page, red, **how).result()


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"server": "http://127.0.0.1:9"}, "cannot be reached"),
        ({"server": "http://127.0.0.1:9", "run": "runs/mine"}, "both say whom to ask"),
        ({"api_key": "sk"}, "there is no --server"),
    ],
)
def test_a_server_that_cannot_be_asked_is_told(how, told):
    with pytest.raises(SystemExit, match=f"error: .*{told}"):
        main(**how)

"""/v1/score and /v1/systemone: scores are those of `VisionLanguageModel.rank`, shapes those of transformers' server."""

import base64
import math

import pytest

from mmpeft.metrics.answer import Answer
from mmpeft.serving.conversation import Posed
from mmpeft.serving.decisions import Decision, softmax
from mmpeft.serving.schemas import ChoiceQuestion, NoulQuestion, ScoreQuestion
from tests.serving.conftest import METHODS, QUESTION, content, error_of
from tests.tiny import make_record

COLOURS = ["red", "blue", "a green square"]


def score(served, **fields):
    body = {
        "model": "default",
        "messages": [{"role": "user", "content": QUESTION}],
        "choices": COLOURS,
    } | fields
    return served.client.post("/v1/score", json=body)


def decide(served, questions, **fields):
    body = {"model": "default", "state": "", "questions": questions} | fields
    return served.client.post("/v1/systemone", json=body)


def asset(image):
    return {"type": "image", "format": "png", "data_base64": base64.b64encode(image.read_bytes()).decode()}


@pytest.mark.parametrize("model", ["base", *METHODS])
def test_scores_are_those_of_rank(served, alone, pictures, model):
    for image in (pictures[0], None):
        told = score(
            served, model=model, messages=[{"role": "user", "content": content(QUESTION, image)}]
        ).json()
        wanted = dict(alone.rank(image, QUESTION, COLOURS, model))
        assert [own["choice"] for own in told["data"]] == COLOURS
        assert {own["choice"]: own["score"] for own in told["data"]} == pytest.approx(wanted, abs=1e-5)
        assert sum(own["probability"] for own in told["data"]) == pytest.approx(1)
        assert told["usage"]["completion_tokens"] == 0
        assert told["usage"]["prompt_tokens"] > 5


UNRANKABLE = [["a"], ["a", "a"], ["a", " "], [], ["a", "<image>"], [str(n) for n in range(65)], "ab"]


@pytest.mark.parametrize("choices", UNRANKABLE)
def test_choices_that_cannot_be_ranked_are_refused(served, choices):
    answer = score(served, choices=choices)
    assert answer.status_code == 400
    assert error_of(answer)["param"] == "choices"


def test_a_question_about_an_image_is_asked_as_it_was_trained(served, alone, pictures):
    image = pictures[0]
    questions = {
        "color": {"type": "choice", "instructions": QUESTION, "criteria": dict.fromkeys(COLOURS)},
        "red": {"type": "noul", "instructions": "is it red?"},
        "many": {"type": "score", "instructions": "how many?", "criteria": ["one", "two", "three"]},
    }
    body = decide(served, questions, state="img-1", assets={"img-1": asset(image)}).json()
    assert body["model"] == "default"
    assert body["usage"]["output_tokens"] == 0
    ranked = {
        "color": alone.rank(image, QUESTION, COLOURS, "default"),
        "red": alone.rank(image, "is it red?", ["yes", "no"], "default"),
        "many": alone.rank(image, "how many?", ["one", "two", "three"], "default"),
    }
    shares = {
        name: {choice: share for (choice, _), share in zip(own, softmax([s for _, s in own]), strict=True)}
        for name, own in ranked.items()
    }
    assert body["answers"]["color"]["probabilities"] == pytest.approx(shares["color"], abs=1e-5)
    assert body["answers"]["color"]["choice"] == ranked["color"][0][0]
    assert body["answers"]["red"]["noul"] == pytest.approx(shares["red"]["yes"], abs=1e-5)
    assert list(body["answers"]["many"]["probabilities"].values()) == pytest.approx(
        [shares["many"][level] for level in ("one", "two", "three")], abs=1e-5
    )
    assert body["answers"]["many"]["legend"] == {"0": "one", "1": "two", "2": "three"}


def test_the_prompt_is_state_instructions_and_descriptions(served, alone, pictures):
    question = {
        "type": "choice",
        "instructions": {"ask": "which of them", "look": "at b"},
        "criteria": {"this": "img-2 is like it", "that": None},
    }
    assets = {"img-2": asset(pictures[3]), "b": asset(pictures[4])}
    body = decide(served, {"q": question}, state=["first", 1], assets=assets, model="lora-a").json()
    prompt = '["first", 1]\n\n{"ask": "which of them", "look": "at <image>"}\nthis: <image> is like it'
    images = (str(pictures[4]), str(pictures[3]))
    (asked,), _ = alone.requests(images, prompt, "lora-a", choices=["this", "that"])
    (wanted,) = alone.answer([asked])
    told = body["answers"]["q"]["probabilities"]
    assert list(told.values()) == pytest.approx(softmax(wanted.scores), abs=1e-5)


def test_one_option_is_certain_without_asking(served):
    told = decide(served, {"q": {"type": "choice", "criteria": {"only": None}}}, state="s").json()["answers"][
        "q"
    ]
    assert told == {"type": "choice", "choice": "only", "confidence": 1.0, "probabilities": {"only": 1.0}}


SCORES = ([-0.1, -3.0, -2.0], [-1.0, -1.0, -1.0], [-4.0, -0.5, -0.2], [-0.3, -9.0], [-1.0])


@pytest.mark.parametrize("scores", SCORES, ids=str)
@pytest.mark.parametrize("kind", ["choice", "score", "noul"])
def test_answers_are_those_that_transformers_makes_of_the_same_probabilities(scores, kind):
    theirs = pytest.importorskip("transformers.decision.template_utils")
    names = ["cold", "mild", "hot"][: len(scores)]
    if kind == "noul":
        scores, own = (scores * 2)[:2], NoulQuestion(type="noul")
    elif kind == "score":
        own = ScoreQuestion(type="score", criteria=names)
    else:
        own = ChoiceQuestion(type="choice", criteria=dict.fromkeys(names))
    config = pytest.importorskip("transformers.decision").DecisionConfig()
    wanted = theirs.Question.from_request("q", own.model_dump(exclude_none=True), config)
    told = Decision("q", own, wanted.options, Posed(make_record(), [], "q"))
    assert _equal(told.answer(scores), wanted.answer(softmax(scores)))


def _equal(one, other) -> bool:
    """Numbers to 1e-12, all else exactly."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    return math.isclose(one, other, abs_tol=1e-12) if isinstance(one, float) else one == other


def test_probabilities_are_those_of_the_calibration():
    from mmpeft.metrics.calibration import probabilities

    scores = [-0.5, -2.0, -0.7]
    answer = Answer.__new__(Answer)
    answer.__dict__.update(scores=scores, choices=["a", "b", "c"], references=["a"], row="1")
    assert softmax(scores) == pytest.approx(probabilities(answer))


CHOICE = {"type": "choice", "criteria": {"a": None, "b": None}}
REFUSED = [
    ({}, {}, "questions"),
    ({"q": {"type": "guess"}}, {}, "questions.q"),
    ({"q": {"type": "choice"}}, {}, "questions.q.criteria"),
    ({"q": {"type": "choice", "criteria": {}}}, {}, "questions.q.criteria"),
    ({"q": {"type": "choice", "criteria": {"a": None, " a": None}}}, {}, "questions.q.criteria"),
    ({"q": {"type": "score", "criteria": ["a", "a"]}}, {}, "questions.q.criteria"),
    ({"q": {"type": "noul", "criteria": {"maybe": "?"}}}, {}, "questions.q.criteria.maybe"),
    ({"q": CHOICE | {"extra": 1}}, {}, "questions.q.extra"),
    ({"q": CHOICE}, {"state": ""}, "questions.q"),
    ({"q": CHOICE}, {"state": "<image>"}, "questions.q"),
    ({"q": CHOICE}, {"assets": {"x": {"type": "image", "data_base64": "%"}}}, "assets.x.data_base64"),
    (
        {"q": CHOICE},
        {"assets": {"x": {"type": "image", "data_base64": "aGFsbG8="}}, "state": "x"},
        "assets.x",
    ),
    ({"q": CHOICE}, {"assets": {"b": {"type": "image", "data_base64": "aGFsbG8="}}}, "questions.q.criteria"),
    ({str(n): CHOICE for n in range(65)}, {}, "questions"),
]


@pytest.mark.parametrize(("questions", "fields", "param"), REFUSED, ids=[case[2] for case in REFUSED])
def test_a_decision_that_cannot_be_made_is_refused_at_its_place(served, questions, fields, param):
    answer = decide(served, questions, **({"state": "s"} | fields))
    assert answer.status_code == 400
    assert error_of(answer)["param"] == param

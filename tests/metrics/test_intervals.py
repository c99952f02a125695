"""Intervals: of sums that are the metrics, clustered, seeded, and right as often as they say."""

import math

import numpy as np
import pytest

from mmpeft.metrics import intervals as module
from mmpeft.metrics.intervals import as_metrics, by_images, intervals, is_bound, of_metric, readable
from mmpeft.metrics.registry import METRICS, evaluate

LABELS = ["red", "green", "blue"]
SENTENCES = [
    "a red cat sits here now",
    "one dog runs on grass",
    "the sky is blue today",
    "two birds fly over it",
]


@pytest.fixture
def classes(make):
    """Sixty ranked answers, two thirds right, with several people's answers and a likelihood each."""
    random = np.random.default_rng(0)
    truths = random.choice(LABELS, 60)
    said = [
        truth if right else random.choice(LABELS)
        for truth, right in zip(truths, random.random(60) < 0.5, strict=True)
    ]
    scores = [[float(2 * (label == answer) - random.random()) for label in LABELS] for answer in said]
    pairs = [
        (str(answer), [str(truth), "red", str(truth), "blue"])
        for answer, truth in zip(said, truths, strict=True)
    ]
    parts = {"choices": [LABELS] * 60, "scores": scores, "num_tokens": [*range(1, 61)]}
    return make(*pairs, **parts, log_likelihood=[*map(float, -random.random(60) * 9)])


@pytest.fixture
def texts(make):
    random = np.random.default_rng(1)
    words = [sentence.split() for sentence in SENTENCES * 5]
    said = [" ".join(word for word in sentence if random.random() < 0.9) for sentence in words]
    return make(
        *[(answer, [text, f"{text} again"]) for answer, text in zip(said, SENTENCES * 5, strict=True)]
    )


OF_TEXTS = {"bleu", "chrf", "rouge1", "rouge2", "rougeL", "cider"}


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_is_what_its_sums_say(name, classes, texts):
    """That a draw of all rows gives the metric: the interval is of this very number."""
    answers = texts if name in OF_TEXTS else classes
    wanted = evaluate(answers, [name])
    own = METRICS[name].sums_of(answers)
    found = {
        f"{name}/{part}" if part else name: value[0]
        for part, value in own.values(own.rows.sum(0)[None]).items()
    }
    assert found == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_has_an_interval_around_it(name, classes, texts):
    answers = texts if name in OF_TEXTS else classes
    values = evaluate(answers, [name])
    found = intervals(answers, range(len(answers)), values)
    assert found.keys() == values.keys()
    for each, (low, high) in found.items():
        # a draw has some of the same rows twice, whose n-grams and gaps differ from those of all rows
        assert low < high
        assert low <= values[each] + 0.05
        assert high >= values[each] - 0.05
    assert found == intervals(answers, range(len(answers)), values), "the seed is fixed"


def test_a_mean_has_the_interval_of_its_standard_error(make):
    answers = make(*[("a" if number % 4 else "b", "a") for number in range(400)])
    low, high = intervals(answers, range(400), {"exact_match": 0.75})["exact_match"]
    half = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert (low, high) == (pytest.approx(0.75 - half, abs=0.005), pytest.approx(0.75 + half, abs=0.005))


def test_questions_about_one_image_are_drawn_together(make):
    """Ten alike answers about each image are no more than one: the interval is that of 40 images."""
    answers = make(*[("a" if number // 10 % 4 else "b", "a") for number in range(400)])
    images = by_images([[f"image{number // 10}"] for number in range(400)])
    low, high = intervals(answers, images, {"exact_match": 0.75})["exact_match"]
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.75 * 0.25 / 40), rel=0.1)
    apart, together = (
        intervals(answers, by_images([own] * 400), {"exact_match": 0.75}) for own in ([], ["one"])
    )
    assert apart["exact_match"][1] - apart["exact_match"][0] < 0.1
    assert together == {}, "of one cluster nothing is known"


def test_all_right_is_not_certain(make):
    answers = make(*[("a", "a")] * 50)
    low, high = intervals(answers, range(50), {"exact_match": 1.0})["exact_match"]
    assert (low, high) == (pytest.approx(0.025 ** (1 / 50)), 1.0)
    wrong = make(*[("b", "a")] * 50)
    assert intervals(wrong, range(50), {"exact_match": 0.0})["exact_match"] == (
        0.0,
        pytest.approx(1 - 0.025 ** (1 / 50)),
    )


@pytest.mark.parametrize("name", ["precision", "recall", "f1"])
def test_a_class_of_few_is_not_certain_either(make, name):
    """Three images of red ones among thirty, two questions about each, all right: as three of three."""
    answers = make(*[("red", "red")] * 6, *[("blue", "blue")] * 54)
    clusters = by_images([[f"image{number // 2}"] for number in range(60)])
    found = intervals(answers, clusters, evaluate(answers, [name]))
    assert found[f"{name}/red"] == (pytest.approx(0.025 ** (1 / 3)), 1.0)
    assert found[f"{name}/blue"] == (pytest.approx(0.025 ** (1 / 27)), 1.0)
    assert found[f"{name}/macro"] == (pytest.approx(0.025 ** (1 / 30)), 1.0)


def test_the_truth_lies_inside_as_often_as_it_says(make, monkeypatch):
    """Of 300 samples of 60 images with four dependent questions each."""
    monkeypatch.setattr(module, "DRAWS", 400)
    random, inside = np.random.default_rng(3), 0
    images = by_images([[str(number // 4)] for number in range(240)])
    for _ in range(300):
        right = random.random(240) < np.repeat(random.choice([0.4, 0.9], 60), 4)
        answers = make(*[("a" if own else "b", "a") for own in right])
        low, high = intervals(answers, images, {"exact_match": right.mean()})["exact_match"]
        inside += low <= 0.65 <= high
    assert 0.9 < inside / 300 < 0.99


def test_the_ends_are_numbers_beside_the_metric():
    numbers = {"f1/red": 0.5, **dict(as_metrics({"f1/red": (0.25, 0.75)}))}
    assert numbers == {"f1/red": 0.5, "ci95_low/f1/red": 0.25, "ci95_high/f1/red": 0.75}
    assert of_metric(numbers, "f1/red") == (0.25, 0.75)
    assert of_metric(numbers, "f1/blue") is None
    assert readable(numbers | {"questions": 9}) == {"f1/red": "0.5 (0.2500 to 0.7500)", "questions": "9"}
    assert [name for name in numbers if is_bound(name)] == ["ci95_low/f1/red", "ci95_high/f1/red"]

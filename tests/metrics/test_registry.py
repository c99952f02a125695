"""The registry: which metrics are told for which answers, under which names, and what it refuses."""

import math
import subprocess
import sys

import pytest
import torch
from torchmetrics.functional.text import perplexity

from mmpeft.metrics.registry import METRICS, Answer, check_metrics, evaluate, exact_match, fitting_metrics

CLASSES = ["accuracy", "precision", "recall", "f1"]
TEXTS = ["bleu", "rouge1", "rouge2", "rougeL", "chrf", "cider"]
CAPTIONS = [("a red cat sits here", "a red cat sits there"), ("one dog runs on grass", "a dog runs on grass")]
COLOURS = [("red", "red"), ("blue", "red"), ("blue", "blue"), ("red", "blue")]


@pytest.mark.parametrize(
    ("prediction", "truth", "right"),
    [("blue", "blue", 1), (" blue\n", "blue", 1), ("", " ", 1), ("Blue", "blue", 0), ("blue.", "blue", 0)],
)
def test_exact_match_trims_white_space_only(prediction, truth, right):
    assert exact_match(prediction, truth) is bool(right)


def test_exact_match_takes_any_reference(make):
    answers = make(("b", ["a", "b "]), ("a", ["a", "b"]), ("c", ["a", "b"]), ("", "d"))
    assert evaluate(answers, ["exact_match"]) == {"exact_match": 0.5}


def test_labels_that_repeat_are_classes(make):
    assert fitting_metrics(make(*COLOURS)) == ["exact_match", *CLASSES]
    assert fitting_metrics(make(*COLOURS, ("red", "green"))) == ["exact_match"]  # seen once
    assert fitting_metrics(make(*[("red", "red")] * 3)) == ["exact_match"]  # one class
    many = [(f"{n}", f"{n}") for n in range(30)] * 2
    assert fitting_metrics(make(*many)) == ["exact_match", *CLASSES]
    assert fitting_metrics(make(*many, *[("30", "30")] * 2)) == ["exact_match"]


def test_captions_are_texts_however_short(make):
    short = [("red square", "a red square"), ("a blue circle", "a blue circle"), ("a cup", "a green cup")]
    rouge = ["rouge1", "rouge2", "rougeL"]
    assert fitting_metrics(make(*short)) == ["exact_match"]
    assert fitting_metrics(make(*short, is_caption=[True] * 3)) == ["exact_match", *rouge, "cider"]
    assert fitting_metrics(make(short[0], is_caption=[True])) == ["exact_match", *rouge]
    assert fitting_metrics(make(*short, is_caption=[True, True, False])) == ["exact_match"]
    both = make(*short, *short, is_caption=[True] * 6)
    assert fitting_metrics(both) == ["exact_match", *CLASSES, *rouge, "cider"]
    assert fitting_metrics(make(*CAPTIONS, is_caption=[True] * 2)) == ["exact_match", *TEXTS]


def test_a_long_word_with_vowel_signs_is_one_word(make):
    names = [("प्रधानमन्त्री", "हिन्दुस्तान"), ("हिन्दुस्तान", "प्रधानमन्त्री")] * 2
    assert fitting_metrics(make(*names)) == ["exact_match", *CLASSES]


def test_long_repeated_references_are_no_classes(make):
    assert fitting_metrics(make(*CAPTIONS, *CAPTIONS)) == ["exact_match", *TEXTS]
    assert fitting_metrics(make(CAPTIONS[0])) == ["exact_match", *TEXTS[:-1]]  # CIDEr needs two rows


@pytest.mark.parametrize(
    ("references", "why"),
    [
        (
            [["a red cat sits here", "A cat."], ["a cat", "A red cat sits here!"]],
            "of all 2 rows say the same",
        ),
        ([["a red cat sits here"]], "at least 2"),
    ],
)
def test_cider_says_where_it_could_only_be_0(make, capsys, references, why):
    answers = make(*[(texts[0], texts) for texts in references])
    assert "cider" not in evaluate(answers)
    assert why in capsys.readouterr().err
    with pytest.raises(ValueError, match=f"cider does not fit the data: .*{why}"):
        check_metrics(["cider"], answers)
    different = [*answers, *make(("", "a blue cat sits there"))]
    assert evaluate(different)["cider"] > 1
    assert not capsys.readouterr().err


@pytest.mark.parametrize("names", [("หมา", "แมว"), ("কুকুর", "বিড়াল"), ("कुत्ता", "बिल्ली")])
def test_classes_in_scripts_with_vowel_signs(make, names):
    long = [" ".join([name] * 3) for name in names]  # as long as a class may be
    answers = make(*[(long[0], long[0]), (long[1], long[0]), (long[1], long[1]), (long[0], long[1])])
    assert fitting_metrics(answers) == ["exact_match", *CLASSES]


def test_rows_with_choices(make):
    colours = [["red", "blue"]] * 2
    answers = make(("red", "red"), ("blue", "red"), choices=colours)
    assert fitting_metrics(answers) == ["exact_match", *CLASSES]
    different = [[f"{n} {letter}" for letter in "abcd"] for n in range(8)]
    answers = make(*[(f"{n} a", f"{n} b") for n in range(8)], choices=different)
    assert fitting_metrics(answers) == ["exact_match", "accuracy"]  # 32 labels
    scored = make(("red", "red"), ("blue", "red"), choices=colours, scores=[[-1.0, -2.0]] * 2)
    assert fitting_metrics(scored) == ["exact_match", *CLASSES, "calibration_error", "brier"]


def test_many_short_references_are_peoples_votes(make):
    answers = make(("2", ["2", "two", "3"] * 3 + ["2"]), ("no", ["yes"] * 6 + ["no"] * 4))
    assert fitting_metrics(answers) == ["exact_match", "vqa_accuracy"]
    some_said_nothing = [*answers, *make(("no", ["no", "yes"]))]
    assert fitting_metrics(some_said_nothing) == ["exact_match", "vqa_accuracy"]
    assert "vqa_accuracy" not in fitting_metrics([*answers, *make(("no", "no"))])


def test_few_short_references_are_spellings_that_are_all_right(make):
    answers = make(("ITC", ["itc", "ITC"]), ("p. 12", ["12", "p. 12", "page 12", "p.12"]), ("1980", "1980"))
    assert fitting_metrics(answers) == ["exact_match", "anls"]
    assert evaluate(answers) == {"exact_match": 1.0, "anls": 1.0}
    assert evaluate(answers[:2], ["vqa_accuracy"])["vqa_accuracy"] < 0.5  # what they got before
    assert fitting_metrics(answers[2:]) == ["exact_match"]


def test_several_references_of_texts_are_texts(make):
    captions = make(*[(text, [text, text]) for text, _ in CAPTIONS])
    assert fitting_metrics(captions) == ["exact_match", *TEXTS]


def test_likelihoods_give_perplexity(make):
    logits = torch.randn(1, 5, 7, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    logs = logits.log_softmax(-1)[0, range(5), tokens[0]].double()
    likelihoods = [logs[:2].sum().item(), logs[2:].sum().item()]
    answers = make(("a", "b"), ("c", "d"), log_likelihood=likelihoods, num_tokens=[2, 3])
    assert fitting_metrics(answers) == ["exact_match", "perplexity"]
    assert evaluate(answers)["perplexity"] == pytest.approx(perplexity(logits, tokens).item(), rel=1e-6)
    (hopeless,) = make(("a", "b"), log_likelihood=[-1e6], num_tokens=[1])
    assert evaluate([hopeless])["perplexity"] == math.inf


def test_values_have_flat_names(make):
    results = evaluate(make(*COLOURS))
    parts = [f"{name}/{part}" for name in CLASSES[1:] for part in ("blue", "red", "macro")]
    assert sorted(results) == sorted(["exact_match", "accuracy", *parts])
    assert all(isinstance(value, float) for value in results.values())
    assert evaluate(make(*COLOURS), ["f1/macro"]) == {"f1/macro": results["f1/macro"]}


def test_every_metric_can_be_asked_for_by_name(make):
    answers = make(
        *[(text, [truth, text]) for text, truth in CAPTIONS],
        choices=[[truth, "no"] for _, truth in CAPTIONS],
        scores=[[-1.0, -3.0]] * 2,
        log_likelihood=[-4.0, -2.0],
        num_tokens=[5, 5],
    )
    results = evaluate(answers, list(METRICS))
    assert {name.partition("/")[0] for name in results} == METRICS.keys()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vqa_accuracy", r"vqa_accuracy does not fit test.jsonl:2 \(id 'q1'\): it has 1 reference"),
        ("perplexity", r"perplexity does not fit test.jsonl:1 \(id 'q0'\): it has no log_likelihood"),
        ("brier", r"test.jsonl:1 \(id 'q0'\): it has no choices with scores"),
        ("calibration_error", r"test.jsonl:1 \(id 'q0'\): it has no choices"),
        ("blue", r"no metric is called 'blue'; closest: \['bleu'"),
        ("f1/rde", r"f1 has no value 'f1/rde'; closest: \['f1/red'"),
    ],
)
def test_what_does_not_fit_is_refused(make, name, message):
    with pytest.raises(ValueError, match=message):
        evaluate(make(("red", ["red", "blue"]), ("red", "red")), [name])


def test_no_answers_are_refused():
    with pytest.raises(ValueError, match="no answers"):
        evaluate([])


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"references": "['a cat', 'the cat']"}, "wanted a list"),
        ({"references": []}, "wanted a list of at least one"),
        ({"references": [3]}, "must be text"),
        ({"choices": ["a", "b"], "scores": [1.0]}, "1 scores for 2 choices"),
        ({"scores": [1.0]}, "1 scores for 0 choices"),
        ({"choices": ["a", "b"], "scores": [1.0, math.nan]}, "not finite"),
        ({"log_likelihood": -1.0}, "wanted both"),
        ({"log_likelihood": 0.0, "num_tokens": 0}, "over at least one token"),
    ],
)
def test_an_answer_whose_parts_contradict_names_its_row(parts, message):
    with pytest.raises(ValueError, match=rf"^a.jsonl:4 \(id 'x'\): .*{message}"):
        Answer("x", "a.jsonl:4", "a", **{"references": ["a"], **parts})


def test_import_is_light():
    code = (
        "import sys, mmpeft.metrics.registry; "
        "print(sys.modules.keys() & {'torch', 'torchmetrics', 'numpy', 'sacrebleu'})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"

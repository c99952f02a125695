"""BLEU, ROUGE and chrF against values worked out by hand, published ones and torchmetrics."""

import math
import random
import sys

import pytest
from torchmetrics.functional.text import chrf_score

from mmpeft.metrics.chrf import chrf
from mmpeft.metrics.text_overlap import bleu, rouge
from mmpeft.metrics.words import words

MAT = ["There is a cat on the mat.", "A cat is on the mat!"]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("The man's dog, a red-haired one, doesn't run!", "the man 's dog a red-haired one does n't run"),
        ("Costs $3.50 -- 1,000 at 2:50 (or “so”)…", "costs 3.50 1,000 at 2:50 or so"),
        ("they’re we'll I'd", "they 're we 'll i 'd"),
        ("eine grüne Tür / l'été", "eine grüne tür l été"),
        ("一只猫 cat猫", "一 只 猫 cat 猫"),
        ("e\u0301te\u0301", "été"),
        (" .\n", ""),
    ],
)
def test_words(text, wanted):
    assert words(text) == wanted.split()


def test_bleu_by_hand():
    # clipped n-grams of 1 to 4 words: 5/6 4/5 3/4 2/3, whose product is 1/3; the nearest reference is as long
    assert bleu(["The cat is on the mat."], [MAT]) == pytest.approx((1 / 3) ** 0.25, abs=1e-6)
    assert bleu(["a cat is on"], [[MAT[1]]]) == pytest.approx(math.exp(1 - 6 / 4), abs=1e-6)


def test_bleu_is_of_the_whole_set_and_of_words():
    # n-grams of the first row as above, of the second 4/4 3/3 2/2 1/1, added up
    value = bleu(["the cat is on the mat", "a dog runs fast"], [MAT, ["a dog runs fast"]])
    assert value == pytest.approx((9 / 10 * 7 / 8 * 5 / 6 * 3 / 4) ** 0.25, abs=1e-6)
    assert bleu(["abcd efgh ijkl mnop"], [["abcdefgh ijklmnop"]]) == 0
    assert bleu([""], [MAT]) == 0


@pytest.mark.parametrize(
    ("prediction", "references", "wanted"),
    [
        # precision and recall by hand: 2/2 and 2/6; no pair; the longest common run in order is one word
        ("mat cat", ["the cat is on the mat"], (1 / 2, 0, 1 / 4)),
        # 4/4 and 4/6; 2/3 and 2/5; "the cat on mat" keeps its order
        ("The cat on mat.", ["the cat is on the mat"], (4 / 5, 1 / 4, 4 / 5)),
        ("My name is John", ["Is your name John"], (0.75, 0, 0.5)),  # torchmetrics' documentation
        ("mat cat", ["nothing", "the cat is on the mat", "mat"], (2 / 3, 0, 2 / 3)),
        ("", ["the cat"], (0, 0, 0)),
        ("eine grüne Tür", ["eine grüne Tür"], (1, 1, 1)),
        ("grüne", ["grne"], (0, 0, 0)),
    ],
)
def test_rouge_by_hand(monkeypatch, prediction, references, wanted):
    monkeypatch.setitem(sys.modules, "nltk", None)  # an import of it would fail
    values = [rouge([prediction], [references], kind) for kind in ("rouge1", "rouge2", "rougeL")]
    assert values == pytest.approx(wanted, abs=1e-6)


def test_rouge_is_the_mean_over_rows():
    value = rouge(["mat cat", "a dog"], [["the cat is on the mat"], ["a dog"]], "rouge1")
    assert value == pytest.approx(0.75, abs=1e-6)


def test_chrf_equals_torchmetrics():
    generator = random.Random(0)
    vocabulary = ["a", "man", "is", "Speaking.", "while", "the", "bird,", "sits", "on", "red", "table"]
    said, *people = ([" ".join(generator.choices(vocabulary, k=k)) for k in (2, 5, 9, 4)] for _ in range(4))
    references = list(zip(*people, strict=True))
    wanted = chrf_score(said, references, n_char_order=6, n_word_order=0, beta=2.0)
    assert chrf(said, references) == pytest.approx(wanted.item(), abs=1e-6)


def test_chrf_by_hand():
    # "abcd" in "abcde": 4 3 2 1 0 0 shared runs of 4 3 2 1 0 0 said and 5 4 3 2 1 0 true
    wanted = sum(5 * n / (n + 4 * (n + 1)) for n in (4, 3, 2, 1)) / 6
    assert chrf(["ab cd"], [["abcde"]]) == pytest.approx(wanted, abs=1e-12)
    assert chrf(["abcdef", ""], [["abcdef"], ["uvwxyz"]]) < chrf(["abcdef"], [["abcdef"]]) == 1

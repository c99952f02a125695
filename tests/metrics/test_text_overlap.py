"""BLEU, ROUGE and chrF against values worked out by hand, published ones and sacrebleu."""

import math
import random
import sys
import unicodedata
from itertools import zip_longest

import pytest
from sacrebleu.metrics import BLEU, CHRF

from mmpeft.metrics.cider import cider_scores
from mmpeft.metrics.text_overlap import bleu, chrf, rouge
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
        ("हिन्दी, की।", "हिन्दी की"),  # vowel signs, virama
        ("ภาษาไทย สวัสดีครับ", "ภาษาไทย สวัสดีครับ"),
        ("বাংলা-ভাষা ৩.৫", "বাংলা-ভাষা ৩.৫"),
        ("שָׁלוֹם עוֹלָם!", "שָׁלוֹם עוֹלָם"),  # points; as they are ordered by NFC
        ("مُحَمَّدٌ كَتَبَ", "مُحَمَّدٌ كَتَبَ"),
        ("می‌خواهم क्‍ष", "می‌خواهم क्‍ष"),  # joiners without a width
        ("m² x_y 👁️ \u0301", "m² x y"),  # signs without a letter are no words
        (" .\n", ""),
    ],
)
def test_words(text, wanted):
    assert words(text) == unicodedata.normalize("NFC", wanted).split()


@pytest.fixture(scope="module")
def captions() -> tuple[list[str], list[list[str]]]:
    """Random predictions, the last of them empty, and one to four references of each."""
    generator = random.Random(0)
    vocabulary = ["a", "Man", "is", "Speaking.", "while", "the", "bird,", "sits", "on", "red-haired", "3.5"]

    def text() -> str:
        return " ".join(generator.choices(vocabulary, k=generator.randint(2, 9)))

    said = [text() for _ in range(40)] + ["", "uvw"]
    return said, [[text() for _ in range(1 + row % 4)] for row in range(len(said))]


@pytest.mark.parametrize(("score", "oracle"), [(bleu, BLEU), (chrf, CHRF)])
def test_numbers_are_those_of_sacrebleu(captions, score, oracle):
    said, references = captions
    first = [[texts[0]] for texts in references]
    wanted = oracle().corpus_score(said, [[texts[0] for texts in references]])
    assert score(said, first) == pytest.approx(wanted.score / 100, abs=1e-12)
    wanted = oracle().corpus_score(said, list(zip_longest(*map(sorted, references))))
    assert score(said, references) == pytest.approx(wanted.score / 100, abs=1e-12)
    assert 0 < score(said, references) < 1
    assert score([MAT[0]] * 3, [MAT] * 3) == 1  # not a little more


@pytest.mark.parametrize("score", [bleu, chrf, lambda *texts: rouge(*texts, "rougeL")])
def test_the_order_of_references_does_not_matter(captions, score):
    said, references = captions
    backwards = [texts[::-1] for texts in references]
    assert score(said, backwards) == score(said, references)
    assert score(["abc", ""], [["abc"], ["x", "long"]]) == score(["abc", ""], [["abc"], ["long", "x"]])


def test_bleu_by_hand():
    # clipped n-grams of 1 to 4 tokens: "The" is not "the", "." is a token; the nearest reference is as long
    value = bleu(["The cat is on the mat."], [MAT])
    assert value == pytest.approx((6 / 7 * 5 / 6 * 4 / 5 * 3 / 4) ** 0.25, abs=1e-12)
    assert bleu(["cat is on the"], [[MAT[1]]]) == pytest.approx(math.exp(1 - 7 / 4), abs=1e-12)
    smoothed = (3 / 4 * 2 / 3 * 1 / 2 * (1 / 2) / 1) ** 0.25  # no run of 4 is shared: counted as half a one
    assert bleu(["a cat is on"], [[MAT[1]]]) == pytest.approx(smoothed * math.exp(1 - 7 / 4), abs=1e-12)


def test_of_two_equally_near_references_the_shorter_is_the_length():
    # 5 words beside 4 and 6, all of whose n-grams are there: no brevity penalty, in either order
    near = ["a b c d", "a b c d e f"]
    assert bleu(["a b c d e"], [near]) == bleu(["a b c d e"], [near[::-1]]) == 1
    assert bleu(["a b c d e"], [near[1:]]) == pytest.approx(math.exp(1 - 6 / 5), abs=1e-12)


def test_bleu_is_of_the_whole_set_and_of_words():
    # n-grams of the first row as above, of the second 4/4 3/3 2/2 1/1, added up
    value = bleu(["The cat is on the mat.", "a dog runs fast"], [MAT, ["a dog runs fast"]])
    assert value == pytest.approx((10 / 11 * 8 / 9 * 6 / 7 * 4 / 5) ** 0.25, abs=1e-12)
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


def test_chrf_by_hand():
    # "abcd" in "abcde": of runs of 1 to 4 all said are true, and 4/5 3/4 2/3 1/2 of the true ones said
    recall = (4 / 5 + 3 / 4 + 2 / 3 + 1 / 2) / 4
    assert chrf(["ab cd"], [["abcde"]]) == pytest.approx(5 * recall / (4 + recall), abs=1e-12)
    assert chrf(["abcdef", ""], [["abcdef"], ["uvwxyz"]]) < chrf(["abcdef"], [["abcdef"]]) == 1


def test_words_that_differ_in_a_vowel_sign_are_other_words():
    for said, true in (("की", "का"), ("दिन", "दान"), ("กิน", "กัน"), ("দিন", "দান")):
        assert [rouge([said], [[true]], kind) for kind in ("rouge1", "rougeL")] == [0, 0]
    assert cider_scores(["की", "दिन"], [["का"], ["दान"]]) == [0, 0]

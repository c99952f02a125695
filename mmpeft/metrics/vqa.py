"""VQA accuracy: an answer is right as far as people gave it.

Source: the evaluation of VQA v2 (Antol et al. 2015, Goyal et al. 2017), as told on visualqa.org/evaluation and done
by its published code. Two differences: that code leaves out the normalisation of rows whose references are all
the same text; we normalise every row, as the rules say. And an answer of which the rules leave nothing ("A", "the",
"?", or none at all) is worth 0, though the reference may be the same: that code, which compares what is left, gives 1
to "the", to "?" and to silence wherever people said "A". Answers that are letters of choices are classes, of which
accuracy is the metric.
"""

import re
from collections.abc import Sequence
from functools import lru_cache

from mmpeft.errors import RefusedError

AGREEING = 3
"""So many people who gave an answer make it wholly right."""
NUMBERS = "zero one two three four five six seven eight nine ten"
DIGITS = {"none": "0", **{word: str(number) for number, word in enumerate(NUMBERS.split())}}
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
"""Neither apostrophe nor colon: they make possessives and times of day."""
CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd somebody'd've somebody'll
somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
"""Those of the published table that its own lower-casing lets through, so without "I'm", "I've" and "I'd've".
It has "somebody'd" the wrong way round, which compares the same."""


def _with_one_apostrophe_lost(word: str) -> list[str]:
    return [word[:place] + word[place + 1 :] for place, char in enumerate(word) if char == "'"]


REPAIRED = {lost: word for word in CONTRACTIONS.split() for lost in _with_one_apostrophe_lost(word)}
"""A contraction that lacks an apostrophe -> the contraction."""


@lru_cache(1 << 16)
def normalise(text: str) -> str:
    """A short answer without what does not matter: case, articles, punctuation, how numbers are spelt. Of articles and
    punctuation alone nothing is left."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    between_digits, bare = re.search(r"\d,\d", text), text
    for mark in PUNCTUATION:
        glued = not (f"{mark} " in text or f" {mark}" in text or between_digits)
        bare = bare.replace(mark, " " if glued else "")
    bare = re.sub(r"\.(?!\d)", "", bare)
    said = [REPAIRED.get(word, word) for word in (DIGITS.get(word, word) for word in bare.lower().split())]
    return " ".join(word for word in said if word not in ARTICLES)


def vqa_score(prediction: str, references: Sequence[str]) -> float:
    """How right an answer is, 0..1: min(people who gave it / 3, 1), the mean over leaving out one person each. An
    answer of which `normalise` leaves nothing agrees with nobody, also where a person said the same.

    Args:
        references: one answer a person, ten in VQA v2. Of fewer than four no answer reaches 1.

    Raises:
        RefusedError: there are fewer than two references, so that nobody is left.
    """
    if len(references) < 2:
        raise RefusedError(
            f"found {len(references)} reference(s); VQA accuracy wants several people's answers"
        )
    given = normalise(prediction)
    agrees = [normalise(reference) == given != "" for reference in references]
    shares = [min((sum(agrees) - own) / AGREEING, 1.0) for own in agrees]
    return sum(shares) / len(shares)

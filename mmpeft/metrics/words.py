"""Tokenization of the metrics that compare texts: what a word is to them."""

import unicodedata

import regex

UNSPACED = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
"""Kana and Han: written without spaces, so that each character counts as a word."""
LETTER = rf"(?:[\p{{L}}\p{{N}}--{UNSPACED}][\p{{M}}\u200c\u200d]*)"
"""A letter or digit with its vowel signs, points and joiners, which `re` does not count among the letters."""
CLITIC = r"(?:n't|'(?:s|m|d|re|ve|ll))\b"
"""What the Penn Treebank splits off a word: "man's" is "man" and "'s", "don't" is "do" and "n't"."""
WORD = regex.compile(
    rf"\d+(?:[.,:]\d+)+|[{UNSPACED}]|{CLITIC}|{LETTER}+?(?={CLITIC})|{LETTER}+(?:-{LETTER}+)*", regex.V1
)
"""3.5, a character, a clitic, what stands before one, or a word such as red-haired."""


def words(text: str) -> list[str]:
    """The words of a text, in lower case and without punctuation.

    Close to what the COCO caption evaluation takes as words (Stanford's PTBTokenizer, then punctuation dropped),
    without its Java: clitics are apart, hyphenated words and numbers whole. Symbols such as "$" are dropped too.
    """
    return WORD.findall(unicodedata.normalize("NFC", text).lower().replace("’", "'"))

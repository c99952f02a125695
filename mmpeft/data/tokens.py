"""Tokenization piece by piece: a user's text never gives a control token, and pieces give what the whole text gives.

Tokenizers look for their added tokens, ``</s>`` or ``<think>``, in whatever text they are given, and many put a space
before every text. Here both are for the caller to say::

    begin("[INST]")      as the tokenizer reads the beginning of a text
    within(" what?")     the same characters further on in a text: no space is added
    section(" what?")    the same after a control token or an image
    template("<s>[INST]")    a template's own text, whose control tokens are such

Splitting special tokens (``split_special_tokens``) leaves added tokens alone that are not called special, such as
Qwen's ``<think>``, and Unigram models find control tokens by themselves: here all are renamed to what nobody can
spell.
"""

import json
import re
import secrets
from typing import Any

from tokenizers import Tokenizer

from mmpeft.errors import RefusedError

PROBE = ("red", " blue")
"""Two pieces of one text, by which a tokenizer shows whether pieces can be tokenised apart."""


class PieceTokenizer:
    """A tokenizer's own tables, read piece by piece.

    Args:
        tokenizer: a Hugging Face tokenizer.

    Raises:
        RefusedError: it is written in Python, or its pieces differ from the whole text.
    """

    def __init__(self, tokenizer: Any):
        if not getattr(tokenizer, "is_fast", False):
            raise RefusedError(
                f"the tokenizer is a {type(tokenizer).__name__}, which is written in Python: it cannot tell a user's "
                "text from control tokens; take one with a tokenizer.json"
            )
        self.tokenizer = tokenizer
        controls = {i: t.content for i, t in tokenizer.added_tokens_decoder.items() if is_control(t)}
        ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        unknown = {tokenizer.unk_token_id} - {*ends}  # what letters become that the vocabulary lacks
        self.controls = {i: text for i, text in controls.items() if i not in unknown}
        """Id -> spelling of every control token."""
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        _hide(state, {text: f"{secrets.token_hex(8)}{i}" for i, text in controls.items()})
        self._begin = Tokenizer.from_str(json.dumps(state))
        changed = state | {key: _without_prefix(state[key]) for key in ("normalizer", "pre_tokenizer")}
        self._within = Tokenizer.from_str(json.dumps(changed)) if changed != state else self._begin
        if self.begin("".join(PROBE)) != self.begin(PROBE[0]) + self.within(PROBE[1]):
            raise RefusedError(
                f"the tokenizer ({type(tokenizer).__name__}) reads {''.join(PROBE)!r} and {PROBE} apart: "
                "the ids differ, and images are to stand between such pieces; take another tokenizer"
            )
        self._section = self._begin if self._prefixes_sections() else self._within

    def begin(self, text: str) -> list[int]:
        """Ids of the beginning of a text."""
        return self._begin.encode(text, add_special_tokens=False).ids

    def within(self, text: str) -> list[int]:
        """Ids of text that goes on after other text."""
        return self._within.encode(text, add_special_tokens=False).ids

    def section(self, text: str) -> list[int]:
        """Ids of text after a control token or an image."""
        return self._section.encode(text, add_special_tokens=False).ids

    def text(self, text: str, markers: re.Pattern[str] | None = None, section: bool = False) -> list[int]:
        """Ids of a user's text: never a control token, and never a marker.

        Markers that are ordinary text to the tokenizer would give the same ids in a user's text as in a template's;
        such a spelling is tokenised letter by letter, which reads the same and has other ids.

        Args:
            text: with the spaces before it.
            markers: what a template writes in ordinary text.
            section: whether it is the first after a control token or an image.
        """
        ids: list[int] = []
        read, start = self.section if section else self.within, 0
        for match in markers.finditer(text) if markers else ():
            ids += read(text[start : match.start()])
            ids += [token for letter in match.group() for token in self.within(letter)]
            read, start = self.within, match.end()
        return ids + read(text[start:])

    def control(self, text: str) -> int | None:
        """The id of a control token by its spelling; None where it is ordinary text."""
        return next((i for i, spelled in self.controls.items() if spelled == text), None)

    def template(self, text: str) -> tuple[str, list[int]]:
        """A template's own text: what is before its first control token, and the ids from there on."""
        told = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=False, return_offsets_mapping=True
        )
        found = zip(told["input_ids"], told["offset_mapping"], strict=True)
        start = next((begin for token, (begin, _) in found if token in self.controls), len(text))
        rest = self.tokenizer(text[start:], add_special_tokens=False, split_special_tokens=False)
        return text[:start], rest["input_ids"] if text[start:] else []

    def _prefixes_sections(self) -> bool:
        """Whether a text after a control token begins as the first text does."""
        eos = self.tokenizer.eos_token or ""
        ids = self.tokenizer(eos + PROBE[0], add_special_tokens=False, split_special_tokens=False)[
            "input_ids"
        ]
        return ids[1:] == self.begin(PROBE[0])


def is_control(token: Any) -> bool:
    """Whether an added token stands for more than its letters. Those not called special may also be words that somebody
    added, or runs of spaces (GPT-NeoX): these are text like any other."""
    return token.special or not all(letter.isalnum() or letter.isspace() for letter in token.content)


def _hide(state: dict[str, Any], names: dict[str, str]) -> None:
    """Renames tokens in the JSON of a tokenizer; their ids stay."""
    for token in state["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    state |= {"post_processor": None, "truncation": None, "padding": None}
    model = state["model"]
    if isinstance(model["vocab"], list):  # Unigram: (piece, score)
        model["vocab"] = [[names.get(piece, piece), *score] for piece, *score in model["vocab"]]
    else:
        model["vocab"] = {names.get(piece, piece): number for piece, number in model["vocab"].items()}
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        merges = (
            tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]
        )
        model["merges"] = [pair for pair in merges if not {*pair, "".join(pair)} & names.keys()]


def _without_prefix(part: Any) -> Any:
    """A normalizer or pre-tokenizer that adds no space in front; None where it did nothing else."""
    if part is None or part["type"] == "Prepend":
        return None
    if part["type"] == "Sequence":
        key = next(key for key, value in part.items() if isinstance(value, list))
        return part | {key: [own for each in part[key] if (own := _without_prefix(each))]}
    changes = {"prepend_scheme": "never", "add_prefix_space": False}
    return part | {key: value for key, value in changes.items() if key in part}

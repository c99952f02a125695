"""What a conversation is made of before it is ids: runs of tokens of one kind, and the layouts that write them."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Set
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Literal

from mmpeft.data.tokens import PieceTokenizer
from mmpeft.errors import RefusedError

IMAGE_TOKEN = -1
"""Stands in the ids for one image feature. No tokenizer can produce it, so no text can forge an image."""

TIME = "<{:.1f} seconds>"
"""Stands before a frame of a video, as in Qwen3-VL (transformers, ``processing_qwen3_vl.py``)."""


@dataclass
class Span:
    """A run of tokens of one kind, in the order in which the model reads them."""

    kind: Literal["begin", "system", "marker", "image", "time", "task", "instruction", "answer", "end"]
    ids: list[int]

    @property
    def has_loss(self) -> bool:
        return self.kind in ("answer", "end")


class Layout(ABC):
    """What stands around images, questions and answers, for one tokenizer.

    Args:
        tokenizer: a Hugging Face tokenizer with an end-of-sequence token.
        control_markers: whether a layout's markers are control tokens where the tokenizer knows them as such.
    """

    def __init__(self, tokenizer: Any, control_markers: bool = True):
        if tokenizer.eos_token_id is None:
            raise RefusedError(
                "the tokenizer has no end-of-sequence token, so answers could never end; set one"
            )
        self.tokenizer = tokenizer
        self.pieces = PieceTokenizer(tokenizer)
        self.end: list[int] = [tokenizer.eos_token_id]
        """What follows an answer."""

    def end_ids(self, of_model: Set[int]) -> Set[int]:
        """The tokens of which each ends an answer that is being written.

        Args:
            of_model: those that end the model's own ``generate``: of instruct models one for a turn and one for a text,
                of which a tokenizer names one. Where they are no control tokens an answer may write them.
        """
        return {self.end[-1], self.tokenizer.eos_token_id} | (of_model & self.pieces.controls.keys())

    @property
    def settings(self) -> dict[str, Any]:
        """What a run must remember to read the same."""
        return {}

    @abstractmethod
    def spans(self, record: Any) -> list[Span]:
        """The whole conversation with one `IMAGE_TOKEN` an image; an answer of None ends it."""

    @abstractmethod
    def answer(self, text: str) -> list[int]:
        """The ids of an answer, without its end."""


def times_said(record: Any) -> Iterator[str]:
    """What stands before each image of a record, in order: its time, before one without any nothing."""
    times = record.get("times")
    return repeat("") if times is None else ("" if time is None else TIME.format(time) for time in times)

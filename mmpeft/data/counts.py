"""What a plan needs to know of examples without their tokens: lengths, and which of them may share a row."""

import hashlib
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np

from mmpeft.data.template import IGNORE_INDEX, NONE_RIGHT, ChoiceSet, Encoded, Example

FIELDS = np.dtype(
    [
        ("group", "S16"),
        ("alone", "?"),
        ("conversations", "<i4"),
        ("tokens", "<i4"),
        ("carrying", "<i4"),
        ("right", "<i4"),
        ("answer", "<i4"),
        ("truncated", "?"),
    ]
)
"""Of one example, 38 bytes: a hash of its images and task, by which examples share a row; whether it has a row of its
own; its conversations; their tokens, image features included; how many of these carry loss, and how many of those are
of answers and right choices; tokens of its longest answer, without its end; whether it was cut at max_length."""
Counts = np.ndarray
"""(examples,) of `FIELDS`."""


def count(examples: Sequence[Example]) -> Counts:
    """What is to know of each."""
    return np.array([count_one(example) for example in examples], FIELDS)


def count_one(example: Example) -> tuple[Any, ...]:
    """The `FIELDS` of an example."""
    parts = example.conversations
    carrying = [len(part.targets) - part.targets.count(IGNORE_INDEX) for part in parts]
    right = carrying
    if isinstance(example, ChoiceSet):
        right = [] if example.right in (None, NONE_RIGHT) else [carrying[example.right]]
    return (
        _group(example),
        isinstance(example, ChoiceSet),
        len(parts),
        sum(len(part.ids) for part in parts),
        sum(carrying),
        sum(right),
        max((_longest_answer(part) for part in parts), default=0),
        example.truncated,
    )


def row_keys(counts: Counts) -> np.ndarray:
    """(examples,) int64: examples of one key may share a row. By task as well as by images: prompts of one task share
    its identifier. A question with its choices has a key of its own."""
    keys = np.unique(counts["group"], return_inverse=True)[1].astype(np.int64)
    return np.where(counts["alone"], len(counts) + np.arange(len(counts)), keys)


def _group(example: Example) -> bytes:
    """Equal bytes, by all that is known of hashes of 128 bits, for equal images and task alone."""
    digest = hashlib.blake2b(repr(example.task).encode("utf-8", "surrogatepass"), digest_size=16)
    for image in example.images:
        own = image if isinstance(image, bytes) else repr(image).encode("utf-8", "surrogatepass")
        digest.update(f" {type(image).__name__} {len(own)} ".encode())
        digest.update(own)
    return digest.digest()


def _longest_answer(part: Encoded) -> int:
    runs = groupby(part.targets, IGNORE_INDEX.__ne__)
    return max((len(list(run)) - 1 for carries_loss, run in runs if carries_loss), default=0)

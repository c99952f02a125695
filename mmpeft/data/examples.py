"""Examples that are encoded when a batch needs them, and were counted before.

Every record is encoded once to be counted, so that what cannot be encoded is refused before the first step. The counts
of a record store that is kept lie beside it.
"""

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from filelock import FileLock
from tqdm.auto import tqdm

from mmpeft.data.counts import FIELDS, Counts, count_one
from mmpeft.data.image_tokens import version_of
from mmpeft.data.kept_stores import code_hash
from mmpeft.data.layouts.notes import Notes
from mmpeft.data.preferred import Sides, encode_preferred
from mmpeft.data.problems import MAX_LISTED, Problems
from mmpeft.data.records import Record, place_of
from mmpeft.data.sequences import Chained, Lazy, parts_of, pick
from mmpeft.data.store import content_of, first_of_image_sets, path_of
from mmpeft.data.template import Example, Template
from mmpeft.errors import RefusedError
from mmpeft.files import whole_file
from mmpeft.hashing import hash_json, hash_rows

AT_ONCE = 2_000
"""Records that a process counts before it tells."""
UNFIT = "too long, or not fit for the template"
"""Why records are skipped."""
WORTH_A_PROCESS = 20_000
"""Records to be counted for which one more process pays."""


class Examples(Lazy[Example]):
    """Records as the model reads them.

    Args:
        records: any number.
        template: encodes them.
        ranks: whether a record with choices is its question with each of them; `Sides` that every record must have.
        what: names the records in errors.
        counted: those that were counted already in this process, by their id and ``ranks``.
        skipped: is told of records that cannot be encoded, which are left out of ``records``; None refuses them.

    Raises:
        DataError: records that cannot be encoded; the message names them. None is left.
    """

    def __init__(
        self,
        records: Sequence[Record],
        template: Template,
        ranks: bool | Sides,
        what: str,
        counted: "dict[tuple[int, bool | Sides], Counted] | None" = None,
        skipped: Notes | None = None,
    ):
        self.template = template
        self.ranks: bool | Sides = ranks
        counted = {} if counted is None else counted
        for part in parts_of(records):
            if (id(part), ranks) not in counted:
                counted[id(part), ranks] = self._counted(part, what, skipped)
        own = [counted[id(part), ranks] for part in parts_of(records)]
        whole = all(each.records is each.of for each in own)
        self.records = records if whole else Chained([each.records for each in own])
        self.counts = np.concatenate([each.counts for each in own]) if own else np.zeros(0, FIELDS)

    def __len__(self) -> int:
        return len(self.records)

    def item(self, number: int) -> Example:
        return self.encode(self.records[number])

    def encode(self, record: Record) -> Example:
        if not isinstance(self.ranks, bool):
            return encode_preferred(self.template, record, self.ranks)
        ranked = self.ranks and "choices" in record
        return self.template.encode_choices(record) if ranked else self.template.encode(record)

    def _counted(self, records: Sequence[Record], what: str, skipped: Notes | None) -> "Counted":
        counts = self._counts_of(records, what)
        good = np.flatnonzero(counts["conversations"])
        if len(good) == len(counts):
            return Counted(records, records, counts)
        problems = self._problems(records, np.flatnonzero(counts["conversations"] == 0).tolist())
        if skipped is None or not len(good):
            problems.refuse(what)
        else:
            skipped.skip(UNFIT, problems.first, problems.count)
        return Counted(records, pick(records, good.tolist()), counts[good])

    def _problems(self, records: Sequence[Record], bad: list[int]) -> Problems:
        """What is wrong with records that could not be encoded."""
        problems = Problems()
        for number in bad[:MAX_LISTED]:
            try:
                self.encode(records[number])
                problems.add(
                    number, f"{place_of(records[number])}: it changed while it was read; start again"
                )
            except RefusedError as error:
                problems.add(number, str(error))
        problems.count = len(bad)
        return problems

    def _counts_of(self, records: Sequence[Record], what: str) -> Counts:
        """Those of records that cannot be encoded are all 0."""
        store, content = path_of(records), content_of(records)
        if store is None:
            return _count(records, self.encode, what)
        how = [_identity(self.template), *_images_of(records, self.template)]
        key = hash_json([content, *how, self.ranks, FIELDS.descr, code_hash()])
        path = store.with_suffix(f".{key}.counts")
        with FileLock(path.with_suffix(".lock")):
            counts = _load(path, len(records))
            if counts is None:
                counts = _count(records, self.encode, what)
                with whole_file(path, counts.nbytes) as unfinished, unfinished.open("wb") as file:
                    np.save(file, counts)
        return counts


class Counted(NamedTuple):
    """A sequence of records that was counted."""

    of: Sequence[Record]
    records: Sequence[Record]
    """Those of them that can be encoded."""
    counts: Counts
    """Of these."""


def _identity(template: Template) -> list[Any]:
    """What decides the tokens of a record."""
    tokenizer = template.tokenizer
    return [
        template.settings,
        template.image_tokens if isinstance(template.image_tokens, int) else template.image_tokens.identity,
        template.layout.end,
        [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizers.__version__],
        tokenizer.backend_tokenizer.to_str(),
    ]


def _images_of(records: Sequence[Record], template: Template) -> list[str]:
    """Identity of the images' files, where their shapes decide how many tokens they have."""
    if isinstance(template.image_tokens, int):
        return []
    named = (image for record in first_of_image_sets(records) for image in record["images"])
    return [hash_rows([image, version_of(image)] for image in named if isinstance(image, str))]


def _load(path: Path, num_records: int) -> Counts | None:
    """None where there are none, or damaged ones."""
    try:
        counts = np.load(path)
    except (OSError, ValueError, EOFError):
        return None
    return counts if counts.dtype == FIELDS and counts.shape == (num_records,) else None


Encode = Callable[[Record], Example]


def _count(records: Sequence[Record], encode: Encode, what: str) -> Counts:
    found: list[Counts] = []
    many = len(records) >= WORTH_A_PROCESS
    with tqdm(total=len(records), desc=f"counting tokens of {what}", unit="row", disable=not many) as bar:
        for counts in _counted(records, encode):
            found.append(counts)
            bar.update(len(counts))
    return np.concatenate(found) if found else np.zeros(0, FIELDS)


def _counted(records: Sequence[Record], encode: Encode) -> Iterator[Counts]:
    """The records in order, `AT_ONCE` together."""
    starts = range(0, len(records), AT_ONCE)
    wanted = min(len(records) // WORTH_A_PROCESS, _cores())
    if wanted < 2 or not sys.platform.startswith("linux"):  # elsewhere a fork is no safe copy
        yield from map(_count_some, repeat(records), repeat(encode), starts)
        return
    # records and template come with the fork: they are not sent
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(wanted, context, _Forked.begin, (records, encode)) as processes:
        yield from processes.map(_Forked.count, starts)


def _count_some(records: Sequence[Record], encode: Encode, start: int) -> Counts:
    stop = min(start + AT_ONCE, len(records))
    counts = np.zeros(stop - start, FIELDS)
    for number in range(start, stop):
        with suppress(RefusedError):  # what is wrong with the first of them is found out once all are counted
            counts[number - start] = count_one(encode(records[number]))
    return counts


class _Forked:
    """What a forked process counts."""

    records: Sequence[Record]
    encode: Encode

    @classmethod
    def begin(cls, records: Sequence[Record], encode: Encode) -> None:
        cls.records, cls.encode = records, staticmethod(encode)

    @classmethod
    def count(cls, start: int) -> Counts:
        return _count_some(cls.records, cls.encode, start)


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1

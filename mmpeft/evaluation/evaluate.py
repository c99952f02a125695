"""Evaluation: the questions of held-out data, through the engine, into metrics, files and pictures."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmpeft.data.formats import DataError
from mmpeft.data.layouts.columns import Columns
from mmpeft.data.layouts.notes import Notes
from mmpeft.data.records import Record, is_caption, said_beside
from mmpeft.data.sequences import Chained, Lazy
from mmpeft.data.shares import Share
from mmpeft.data.sources import load_records
from mmpeft.errors import RefusedError, require_positive
from mmpeft.evaluation.answer_log import AnswerLog
from mmpeft.hashing import hash_json, hash_rows
from mmpeft.inference.decoding import Sampling
from mmpeft.inference.engine import Engine, Work
from mmpeft.inference.requests import AnswerBy, Completion, Request
from mmpeft.metrics.answer import Answer
from mmpeft.metrics.registry import check_metrics
from mmpeft.paths import resolve
from mmpeft.runs.manifest import LEAST_NEW_TOKENS

NUM_HEX = 32
"""Digits of an image's identity beside an answer."""
HELD_TEXT = "embedded/manual/held.jsonl"
HELD_IMAGES = "embedded/photos/questions.jsonl"


@dataclass
class EvaluationConfig:
    """How held-out questions are answered and measured."""

    answer_by: AnswerBy = "auto"
    """"rank" picks the most likely of a row's choices, "generate" writes; "auto" ranks the rows that have choices."""
    max_new_tokens: int | None = None
    """Longest answer in tokens; None is as long as the longest answer that was trained on, and at least 64."""
    metrics: list[str] | None = None
    """By name; None takes those that fit the data."""
    held_text: str = HELD_TEXT
    """Data file whose answers `mmpeft test --forgetting` reads as plain text."""
    held_images: str | None = None
    """Data file of images whose answers it reads behind their questions; None is embedded/photos/questions.jsonl
    beside the embedded text, and none beside a text of your own."""

    def __post_init__(self):
        require_positive("test.max_new_tokens", self.max_new_tokens)
        check_metrics(self.metrics or [], [])  # the names; whether they fit is seen with the data

    def ranks(self, record: Record) -> bool:
        """Whether a record is answered by ranking its choices.

        Raises:
            DataError: it should be and has none.
        """
        if self.answer_by == "rank" and "choices" not in record:
            raise DataError(
                f"{record['where']}: {record['id']!r} has no choices to rank; add them, or set test.answer_by to auto"
            )
        return self.answer_by != "generate" and "choices" in record

    def reads_truths(self, records: Sequence[Record]) -> bool:
        """Whether the true answers are read as well, for perplexity: asked for, or of text alone."""
        if self.metrics is not None:
            return "perplexity" in self.metrics
        return not any(record["images"] or "choices" in record for record in records)

    def held_texts(self, columns: Columns) -> list[str]:
        """Plain text that nothing was trained on.

        Args:
            columns: data.columns and data.ignore, by which a file of the user's own is read; not all need be in it.
        """
        records = _held(self.held_text, columns)
        return [str(record["turns"][-1][1]) for record in records]

    def held_records(self, columns: Columns, reads_images: bool) -> Sequence[Record]:
        """Questions about images that nothing was trained on, with their answers; see `held_texts`.

        Args:
            reads_images: whether the model has an encoder; one without is not asked unless a file was named.
        """
        usual = HELD_IMAGES if self.held_text == HELD_TEXT and reads_images else None
        path = self.held_images or usual
        return _held(path, columns) if path else []

    def check(self, records: Sequence[Record]) -> None:
        """What is wrong with the settings is better told before everything is answered.

        Raises:
            RefusedError: a metric does not fit a record.
        """
        reads = self.reads_truths(records)
        if self.metrics:
            answers = [as_answer(record, _stub(record, self.ranks(record), reads)) for record in records]
            check_metrics(self.metrics, answers)


def _held(path: str, columns: Columns) -> Sequence[Record]:
    """What comes with mmpeft is read without the user's columns."""
    given = Columns() if path in (HELD_TEXT, HELD_IMAGES) else columns
    return load_records(resolve(path), given, notes=Notes())


class Requests(Lazy[Request]):
    """The questions of records, each made when it is asked for."""

    def __init__(
        self,
        records: Sequence[Record],
        owners: Sequence[str],
        adapters: Mapping[str, str | None],
        config: EvaluationConfig,
        sampling: Sampling,
        reads_truths: bool,
    ):
        self.records, self.owners, self.adapters, self.config = records, owners, adapters, config
        self.sampling, self.reads_truths = sampling, reads_truths

    def __len__(self) -> int:
        return len(self.records)

    def item(self, number: int) -> Request:
        record, adapter = self.records[number], self.adapters[self.owners[number]]
        return Request(record, adapter, self.config.ranks(record), self.sampling, self.reads_truths)


class Evaluation:
    """The questions of a run's held-out data and their answers, on disk as they come.

    Args:
        engine: answers.
        records: finetune -> its questions; they are numbered through all finetunes.
        adapters: finetune -> the adapter that answers; None is the base.
        config: how, ``max_new_tokens`` included.
        identity: of the base; the answers of another one, or of other weights, are begun anew.
        log: file of the answers so far; None writes none.
        measured: whether the answers are measured by true ones.
        left_out: finetunes that cannot be asked, and why: the error of each of their questions.
        share: whose batches are answered here.
        wait: until all processes are here.

    Raises:
        RefusedError: a metric does not fit a record. Nothing is answered then.
    """

    def __init__(
        self,
        engine: Engine,
        records: Mapping[str, Sequence[Record]],
        adapters: Mapping[str, str | None],
        config: EvaluationConfig,
        identity: dict[str, Any],
        log: Path | None,
        measured: bool,
        left_out: Mapping[str, RefusedError],
        share: Share = Share(),  # noqa: B008 never written to
        wait: Callable[[], object] = lambda: None,
    ):
        self.engine, self.left_out = engine, left_out
        self.records = Chained(list(records.values()))
        self.owners = [name for name, own in records.items() for _ in own]
        if measured:
            config.check(self.records)
        reads = measured and config.reads_truths(self.records)
        sampling = Sampling(config.max_new_tokens or LEAST_NEW_TOKENS)
        self.requests = Requests(self.records, self.owners, adapters, config, sampling, reads)
        asked = hash_rows(map(self._asked, self.requests))
        how = [
            config.answer_by,
            sampling.max_new_tokens,
            engine.template.settings,
            reads,
            asdict(engine.packing),
        ]
        belongs_to = hash_json([identity, engine.model.trained_hash(), asked, how])
        self.log = AnswerLog(log, belongs_to, share, wait)
        missing = [n for n in range(len(self.requests)) if n not in self.log.answers]
        if len(missing) < len(self.requests):
            told = len(self.requests) - len(missing)
            print(f"{told} of {len(self.requests)} answers are there already; going on")
        able = [n for n in missing if self.owners[n] not in left_out]
        refused, works = engine.plan(self.requests, able)
        refused += [
            (n, Completion.refused(left_out[self.owners[n]])) for n in missing if self.owners[n] in left_out
        ]
        # Lightning passes over a test without batches, its end included
        self.works = share.of_items(works) or [Work([])]
        self.log.append(share.of_items(refused))

    def __len__(self) -> int:
        return len(self.works)

    def __iter__(self) -> Iterator[Work]:
        """The batches that are still to be answered."""
        return iter(self.works)

    def run(self, work: Work) -> None:
        """Answers a batch and puts the answers on disk."""
        self.log.append(self.engine.run(work, self.requests))

    def answered(self) -> Iterator[tuple[Record, str, Completion]]:
        """(record, finetune, completion) in the order of the data, of all that were answered."""
        for number, completion in sorted(self.log.answers.items()):
            yield self.records[number], self.owners[number], completion

    def texts(self) -> dict[int, str]:
        """Number of the record -> its answer, of those that have one."""
        return {n: c.text for n, c in self.log.answers.items() if c.error is None}

    def image_keys(self, record: Record) -> list[str]:
        """Identities of a question's images, by their content."""
        return [self._key(image)[:NUM_HEX] for image in record["images"]]

    def _asked(self, request: Request) -> list[Any]:
        record = request.record
        images = [self._key(image) for image in record["images"]]
        told = [record["id"], record["turns"], record.get("choices"), record["task"], images, request.adapter]
        return [*told, *said_beside(record)]

    def _key(self, image: Any) -> str:
        try:
            return self.engine.features.key(image)
        except RefusedError as error:  # the engine will say so
            return str(error)


def as_answer(record: Record, completion: Completion) -> Answer:
    """What metrics read."""
    return Answer(
        id=record["id"],
        where=record["where"],
        prediction=completion.text,
        references=record.get("references") or [str(record["turns"][-1][1])],
        choices=record.get("choices"),
        scores=completion.scores,
        log_likelihood=completion.log_likelihood,
        num_tokens=completion.num_tokens,
        is_caption=is_caption(record),
    )


def _stub(record: Record, ranked: bool, reads_truth: bool) -> Completion:
    """An answer that says nothing, with the parts that the answer to this record will have."""
    scores = [0.0] * len(record.get("choices", ())) if ranked else None
    likelihood = (0.0, 1) if reads_truth or scores else (None, None)
    return Completion("", "choice" if ranked else "stop", scores, *likelihood)

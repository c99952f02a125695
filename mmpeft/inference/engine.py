"""The inference engine: requests in, for each a completion or its own error out.

``ask``, ``caption``, ``rank``, ``mmpeft test`` and ``predict``, the report's examples, the demo and captioning all
stand on it. It alone turns records into batches to be answered::

    Request(record, adapter, sampling)  -->  encode  -->  pack into rows, rows into batches  -->  Completion
                                                          written: prefill, then a token a step
                                                          ranked:  all choices of a question in one row

An unreadable image, a prompt that is too long or an unknown finetune is the error of the requests that need it; all
others are answered.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmpeft.data.batch import Batch
from mmpeft.data.choices import check_choices
from mmpeft.data.counts import FIELDS, count_one, row_keys
from mmpeft.data.encoder import stacked
from mmpeft.data.features import FeatureCache
from mmpeft.data.loader import Features, make_batch
from mmpeft.data.packing import PREFIX, Role
from mmpeft.data.plan import PackingConfig, plan_batches
from mmpeft.data.records import check_question, place_of
from mmpeft.data.template import Encoded, Example, Template
from mmpeft.errors import RefusedError
from mmpeft.inference.decoding import Decoder
from mmpeft.inference.requests import Completion, Request
from mmpeft.inference.writer import Writer
from mmpeft.models.multimodal import MultimodalModel
from mmpeft.models.token_losses import TokenLosses, length_normalised

Numbered = tuple[int, Completion]
"""(number of the request, its completion)"""


@dataclass
class Work:
    """Requests that are answered together: one batch, all written or all ranked."""

    rows: list[list[int]]
    """Per row the numbers of its requests, which are about the same images."""


class Engine:
    """Answers requests on one model.

    Args:
        model: in eval mode while it answers.
        template: writes the prompts.
        features: of images, by content.
        packing: how requests fill rows and batches.
        share: whether what all prompts of a batch begin with is read once.
        likely: whether completions that are written say how likely they are.
    """

    def __init__(
        self,
        model: MultimodalModel,
        template: Template,
        features: FeatureCache,
        packing: PackingConfig | None = None,
        share: bool = False,
        likely: bool = False,
    ):
        self.share, self.likely = share, likely
        self.model, self.template, self.features = model, template, features
        self.packing = packing or PackingConfig(max_length=template.max_length)

    def answer(self, requests: Sequence[Request]) -> list[Completion]:
        """The completion of every request, in their order."""
        found = dict(self.stream(requests))
        return [found[number] for number in range(len(requests))]

    def stream(self, requests: Sequence[Request]) -> Iterator[Numbered]:
        """Completions as their batches are done, in any order."""
        refused, works = self.plan(requests)
        yield from refused
        for work in works:
            yield from self.run(work, requests)

    def plan(
        self, requests: Sequence[Request], among: Iterable[int] | None = None
    ) -> tuple[list[Numbered], list[Work]]:
        """Encodes requests and shares them out: those that cannot be asked, and the batches of the others. Of each its
        length is kept; it is encoded again when its batch is answered.

        Args:
            requests: all there are.
            among: numbers of those to be answered; all by default.
        """
        refused: list[Numbered] = []
        written, ranked = _Counted(), _Counted()
        for number in range(len(requests)) if among is None else among:
            request = requests[number]
            try:
                example = self.encode(request)
            except RefusedError as error:
                refused.append((number, Completion.refused(error)))
            else:
                (ranked if request.rank else written).add(number, request.adapter, example)
        groups = [group for group in (written, ranked) if group.numbers]
        return refused, [Work(rows) for group in groups for rows in group.share_out(self.packing)]

    def run(self, work: Work, requests: Sequence[Request]) -> list[Numbered]:
        """Answers one batch."""
        own = {number: requests[number] for row in work.rows for number in row}
        answers: list[Numbered] = []
        examples: dict[int, Example] = {}
        for number, request in own.items():
            try:
                examples[number] = self.encode(request)
            except RefusedError as error:  # its image has gone since it was planned
                answers.append((number, Completion.refused(error)))
        loaded = self._load_images(own, examples)
        rows: list[list[int]] = []
        for row in ([number for number in row if number in examples] for row in work.rows):
            images = [loaded[key] for number in row[:1] for key in examples[number].images]
            if errors := [each for each in images if isinstance(each, RefusedError)]:
                answers += [(number, Completion.refused(errors[0])) for number in row]
            elif row:
                rows.append(row)
        features: dict[str, Any] = loaded  # those of the rows left are all there
        asked = _Asked(self.model, own, rows, lambda keys: stacked([features[k] for k in keys]))
        return answers + list(self._run_rows(asked, examples).items())

    def _run_rows(self, asked: "_Asked", examples: dict[int, Example]) -> dict[int, Completion]:
        """What the model refuses, such as a row beyond its window, is the error of the request that needs it: a batch
        that was refused is asked row by row, a row question by question."""
        if not asked.rows:
            return {}
        answer = self._rank if asked.requests[asked.rows[0][0]].rank else self._write
        try:
            with torch.inference_mode():
                found = answer(asked, examples)
                self._read_truths(asked, found)
                return found
        except RefusedError as error:
            if len(asked.numbers) == 1:
                return {asked.numbers[0]: Completion.refused(error)}
        alone = [[row] for row in asked.rows] if len(asked.rows) > 1 else [[[n]] for n in asked.numbers]
        parts = [self._run_rows(replace(asked, rows=rows), examples) for rows in alone]
        return {number: own for part in parts for number, own in part.items()}

    def tokens(self, request: Request) -> Iterator[str]:
        """One answer as it is written, piece by piece.

        Raises:
            RefusedError: it cannot be asked.
        """
        example = self.encode(request)
        asked = _Asked(self.model, {0: request}, [[0]], lambda _: self.features(request.record["images"]))
        told, text = "", ""
        for writer in self._steps(asked, {0: example}):
            text = writer.answers[0].text()
            if len(settled := text[: writer.answers[0].settled(text)]) > len(told):
                yield settled[len(told) :]
                told = settled
        if len(text) > len(told):
            yield text[len(told) :]

    # -- planning -------------------------------------------------------------------------------------------

    def encode(self, request: Request) -> Example:
        """A request's prompt as the model reads it. Images go by their content: equal ones share a row and are encoded
        once.

        Raises:
            RefusedError: an unknown finetune, an image that is not there, a prompt that is too long.
        """
        if request.adapter is not None:
            self.model.bank.entry(request.adapter)
        record = request.record
        check_question(record["turns"][-1][0], record["where"])
        if request.rank and record.get("choices"):
            check_choices(record["choices"], place_of(record))  # pyright: ignore
        keys = [self.features.key(image) for image in record["images"]]
        encoded = (
            self.template.encode_choices(record) if request.rank else self.template.encode_prompt(record)
        )
        for conversation in encoded.conversations:
            conversation.images = keys
        return encoded

    def _load_images(
        self, requests: Mapping[int, Request], examples: Mapping[int, Example]
    ) -> dict[str, Tensor | RefusedError]:
        """Key -> features, or why there are none."""
        images = {
            key: image
            for number, example in examples.items()
            for key, image in zip(example.images, requests[number].record["images"], strict=True)
        }
        return dict(zip(images, self.features.load(list(images.values())), strict=True))

    # -- answering ------------------------------------------------------------------------------------------

    def _write(self, asked: "_Asked", examples: dict[int, Example]) -> dict[int, Completion]:
        *_, writer = self._steps(asked, examples)
        found = {n: own.completion() for n, own in zip(asked.numbers, writer.answers, strict=True)}
        for completion, answer in zip(found.values(), writer.answers, strict=True):
            completion.log_probability = answer.log_probability if self.likely else None
        return found

    def _steps(self, asked: "_Asked", examples: dict[int, Example]) -> Iterator["Writer"]:
        """What has been written after every step."""
        samplings = [asked.requests[number].sampling for number in asked.numbers]
        with torch.inference_mode():
            ends = self.template.layout.end_ids(self.model.reader.end_ids)
            decoder = Decoder(self.model, ends, share=self.share)
            handles = decoder.join(asked.batch(examples), samplings)
            writer = Writer(self.template, samplings, handles, self.likely)
        while len(decoder):
            with torch.inference_mode():
                writer.take(decoder)
            yield writer

    def _rank(self, asked: "_Asked", examples: dict[int, Example]) -> dict[int, Completion]:
        batch = asked.batch(examples)
        losses, table = self.model.token_losses(batch, in_float32=True), batch.conversations
        found: dict[int, Completion] = {}
        for row, scores in enumerate(length_normalised(losses, len(asked.rows)).tolist()):
            (number,) = asked.rows[row]
            found[number] = Completion.chosen(asked.requests[number], scores)
            for segment in table.segments[(table.rows == row) & (table.roles == Role.RIGHT)].tolist():
                add_likelihood(found[number], losses, row, segment)
        return found

    def _read_truths(self, asked: "_Asked", found: dict[int, Completion]) -> None:
        """Adds how likely the records' own answers are; those that were ranked know it already."""
        wants = {n for n in asked.numbers if asked.requests[n].read_truth and not asked.requests[n].rank}
        rows = [own for row in asked.rows if (own := [number for number in row if number in wants])]
        if not rows:
            return
        truths: dict[int, Example] = {number: self._truth(asked.requests[number]) for number in wants}
        losses = self.model.token_losses(replace(asked, rows=rows).batch(truths), in_float32=True)
        for row, numbers in enumerate(rows):
            for segment, number in enumerate(numbers, start=PREFIX + 1):
                add_likelihood(found[number], losses, row, segment)

    def _truth(self, request: Request) -> Encoded:
        prompt = self.encode(request)
        assert isinstance(prompt, Encoded), "a question that was written has no choices"
        return self.template.encode_answer(prompt, str(request.record["turns"][-1][1]))


class _Counted:
    """Requests that are to be shared out among batches, by what they are long."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self._adapters: list[str | None] = []
        self._counts: list[Any] = []

    def add(self, number: int, adapter: str | None, example: Example) -> None:
        self.numbers.append(number)
        self._adapters.append(adapter)
        self._counts.append(count_one(example))

    def share_out(self, packing: PackingConfig) -> Iterator[list[list[int]]]:
        """The rows of each batch, as numbers of requests; those of one row share images, task and adapter."""
        counts = np.array(self._counts, FIELDS)
        keys = list(zip(row_keys(counts).tolist(), self._adapters, strict=True))
        for batch in plan_batches(keys, counts["tokens"], packing):
            yield [[self.numbers[place] for place in row] for row in batch]


@dataclass
class _Asked:
    """Requests of one batch whose images are there."""

    model: MultimodalModel
    requests: Mapping[int, Request]
    rows: list[list[int]]
    features: Features

    @property
    def numbers(self) -> list[int]:
        return [number for row in self.rows for number in row]

    def batch(self, examples: dict[int, Example]) -> Batch:
        adapters = [self.requests[row[0]].adapter for row in self.rows]
        return make_batch(examples, self.rows, self.features, adapters).to(self.model.device)


def add_likelihood(completion: Completion, losses: TokenLosses, row: int, segment: int) -> None:
    """Adds how likely the record's own answer is, which is one segment of a row."""
    own = losses.nll[(losses.rows == row) & (losses.segments == segment)]
    completion.log_likelihood, completion.num_tokens = -float(own.sum()), len(own)

"""k-shot prompting (in-context learning): examples with images and answers, as earlier turns of a conversation."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from mmpeft.data.batch import Batch, collate
from mmpeft.data.encoding import encode_images
from mmpeft.data.features import FeatureCache
from mmpeft.data.formats import DataError
from mmpeft.data.packing import PREFIX, PackedRow, pack_choices
from mmpeft.data.records import Record, place_of, times_of_images
from mmpeft.data.template import IGNORE_INDEX, ChoiceSet, Encoded, Template
from mmpeft.errors import RefusedError
from mmpeft.inference.engine import Engine
from mmpeft.inference.requests import Request
from mmpeft.models.multimodal import MultimodalModel
from mmpeft.models.token_losses import length_normalised


class FewShotPrompt:
    """Answers questions with choices behind the same examples, by rank classification.

    Args:
        template: writes the conversations; its max_length bounds examples, question and choice together.
        examples: records with answers, in the order in which the model reads them; none asks the question alone.
        adapter: the finetune that answers; None is the frozen base, with the projector that finetunes share.
    """

    def __init__(
        self,
        model: MultimodalModel,
        template: Template,
        examples: Sequence[Record] = (),
        adapter: str | None = None,
    ):
        self.model, self.template, self.adapter = model, template, adapter
        self.turns = [turn for example in examples for turn in example["turns"]]
        self.images = [image for example in examples for image in example["images"]]
        self.times = [time for example in examples for time in times_of_images(example)]
        self.systems = {example.get("system") for example in examples}
        self._kept: tuple[DynamicCache, list[int]] | None = None

    def encode(self, record: Record) -> ChoiceSet:
        """The record's question behind the examples, with each of its choices. Its task stands in every turn.

        Raises:
            DataError: the whole is longer than the template's max_length.
        """
        return self.template.encode_choices(self._behind_examples(record))

    def features(self, images: Sequence[str | bytes]) -> Tensor | list[Tensor] | None:
        """(images, image tokens, vision dim), or (image tokens, vision dim) of each; an image that comes twice is
        encoded once. None without images."""
        if not images:
            return None
        return encode_images(self.model.vision_encoder, images)

    def scores(self, record: Record) -> Tensor:
        """(choices,) mean log-probability of every choice, by the engine; examples and question are computed once for
        all, and their images encoded now.

        Raises:
            RefusedError: it cannot be asked.
        """
        nothing_kept = FeatureCache(None, self.model.vision_encoder)
        engine = Engine(self.model, self.template, nothing_kept)
        (done,) = engine.answer([Request(self._behind_examples(record), self.adapter, rank=True)])
        if done.refusal is not None:
            raise done.refusal
        return torch.tensor(done.scores)

    @torch.no_grad()
    def keep_examples(self, task: str | None, features: Tensor | list[Tensor] | None) -> None:
        """Computes keys and values of the examples, for any number of `kept_scores`.

        Args:
            task: of the questions that will be asked.
            features: of the images of the examples.
        """
        system = next(iter(self.systems), None)
        examples: Any = {"images": self.images, "times": self.times, "turns": self.turns}
        examples |= {"task": task, "system": system}
        spans = self.template.spans(examples)
        ids = [token for span in spans for token in span.ids]
        row = PackedRow(images=self.images)  # whose features are checked by the model alone
        row.append(Encoded(ids, [IGNORE_INDEX] * len(ids)), 0, len(ids), PREFIX)
        cache = DynamicCache()
        self.model.hidden_states(self._batch(row, features), cache)
        self._kept = cache, ids

    @torch.no_grad()
    def kept_scores(self, question: ChoiceSet, features: Tensor | list[Tensor] | None) -> Tensor:
        """`scores`, but of the examples only the kept keys and values are read.

        Args:
            question: as `encode` made it.
            features: of the images of the question alone.

        Raises:
            RefusedError: no examples are kept, or not those before this question.
        """
        row = pack_choices(question)
        cache, kept = self._kept or (None, [])
        length = len(kept)
        if cache is None or row.ids[:length] != kept:
            raise RefusedError(
                "the question does not stand behind the kept examples; call keep_examples() with its own task first "
                f"(it is {question.task!r})"
            )
        before = len(self.images)
        own = None if row.image_tokens is None else row.image_tokens[before:]
        batch = self._batch(replace(row, images=row.images[before:], image_tokens=own), features)
        losses = self.model.token_losses(batch, cache, new=len(row.ids) - length)
        cache.crop(length - len(row.ids))  # the next question must not read this one
        return length_normalised(losses, 1)[0]

    def _behind_examples(self, record: Record) -> Any:
        if self.systems - {record.get("system")}:
            raise DataError(
                f"{place_of(record)} has another system turn than the examples before it; one conversation has one"
            )
        images, turns = [*self.images, *record["images"]], [*self.turns, *record["turns"]]
        return record | {
            "images": images,
            "times": [*self.times, *times_of_images(record)],
            "turns": turns,
        }

    def _batch(self, row: PackedRow, features: Tensor | list[Tensor] | None) -> Batch:
        return collate([row], features, [self.adapter]).to(self.model.device)

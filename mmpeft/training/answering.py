"""How a batch of questions is answered for an evaluation: written, or picked from the choices."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from mmpeft.data.batch import Batch
from mmpeft.data.packing import NO_CHOICES, UNKNOWN
from mmpeft.data.template import Template
from mmpeft.evaluation.answer_log import Answered
from mmpeft.inference.decoding import generate
from mmpeft.models.multimodal import MultimodalModel
from mmpeft.models.token_losses import length_normalised

Answers = list[tuple[int, Answered]]
"""(number of the record, answer)"""


@torch.no_grad()
def answer(model: MultimodalModel, template: Template, batch: Batch, records: Sequence[Any]) -> Answers:
    """The answers to a batch of prompts, or of questions with their choices; of one kind."""
    if batch.right[0] != NO_CHOICES:
        return _ranked(model, batch, records)
    written = generate(model, batch, template.tokenizer.eos_token_id)
    return [
        (number, Answered(template.decode(ids)))
        for numbers, row in zip(batch.examples, written, strict=True)
        for number, ids in zip(numbers, row, strict=True)
    ]


@torch.no_grad()
def add_likelihoods(
    model: MultimodalModel, answers: Answers, batch: Batch, with_truths: Callable[[Batch], Batch]
) -> None:
    """Adds how likely the true answers are, by reading them.

    Args:
        model: what answered.
        answers: to the batch; those that were ranked know it already.
        batch: of the questions.
        with_truths: the batch -> its conversations with the true answers.
    """
    if batch.right[0] != NO_CHOICES:
        return
    by_number = dict(answers)
    losses = model.token_losses(with_truths(batch))
    for row, numbers in enumerate(batch.examples):
        for segment, number in enumerate(numbers, start=1):
            own = losses.nll[(losses.rows == row) & (losses.segments == segment)]
            by_number[number].log_likelihood, by_number[number].num_tokens = -float(own.sum()), len(own)


def _ranked(model: MultimodalModel, batch: Batch, records: Sequence[Any]) -> Answers:
    losses = model.token_losses(batch)
    answers: Answers = []
    for row, scores in enumerate(length_normalised(losses, len(batch.right)).tolist()):
        (number,) = batch.examples[row]
        choices = records[number]["choices"]
        scores = scores[: len(choices)]
        answer = Answered(choices[scores.index(max(scores))], scores)
        if batch.right[row] != UNKNOWN:
            own = losses.nll[(losses.rows == row) & (losses.segments == batch.right[row])]
            answer.log_likelihood, answer.num_tokens = -float(own.sum()), len(own)
        answers.append((number, answer))
    return answers

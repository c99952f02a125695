"""One question put to a run and everything a person is to see of the answer: the command line's and the demo's."""

from collections.abc import Sequence
from dataclasses import dataclass

from mmpeft.data.choices import are_for_any_question
from mmpeft.inference.asked import Images
from mmpeft.inference.requests import AnswerBy, Completion, Request
from mmpeft.inference.sampling import Sampling
from mmpeft.inference.vlm import VisionLanguageModel
from mmpeft.names import RESERVED_NAME
from mmpeft.runs.manifest import Manifest

SHOWN = 8
"""Choices that a remark names."""


@dataclass
class Reply:
    """An answer and what goes with it."""

    text: str
    ranking: list[tuple[str, float]]
    """Choices and scores as `VisionLanguageModel.rank` gives them; empty where the answer was written."""
    remarks: list[str]
    """What the answer does not say of itself; of one without a word the last says so."""


def reply(
    vlm: VisionLanguageModel,
    image: Images,
    question: str,
    adapter: str | None = None,
    task: str | None = None,
    choices: Sequence[str] | None = None,
    answer_by: AnswerBy = "auto",
    sampling: Sampling | None = None,
    prefix: str = "",
) -> Reply:
    """Asks one question; the arguments are those of `VisionLanguageModel.requests`.

    Args:
        prefix: what stands before the names of inputs in remarks, such as the command line's "--".

    Raises:
        RefusedError: it cannot be asked.
    """
    (request,), _ = vlm.requests(image, question, adapter, task, sampling, choices, answer_by)
    (completion,) = vlm.answer([request])
    if completion.refusal is not None:
        raise completion.refusal
    told = remarks(vlm.manifest, request, completion, choices is not None, answer_by, prefix)
    return Reply(completion.text, completion.ranking(request), told)


def remarks(
    manifest: Manifest,
    request: Request,
    completion: Completion,
    given: bool = False,
    answer_by: AnswerBy = "auto",
    prefix: str = "",
    who: str | None = None,
) -> list[str]:
    """What an answer does not say of itself; of one without a word the last says so.

    Args:
        given: whether the choices were.
        prefix: as in `reply`.
        who: what the finetune is called; by default as the request calls it.
    """
    name = who or request.adapter
    told = _remarks(manifest, request, completion, answer_by != "generate", prefix, name)
    if not given and request.rank:
        told += _choice_remarks(manifest, request, prefix, name or RESERVED_NAME)
    return told


def _choice_remarks(manifest: Manifest, request: Request, prefix: str, who: str) -> list[str]:
    """That the choices were not made for this question, as far as is known."""
    choices = request.record.get("choices", [])
    if not are_for_any_question(manifest.choices.get(request.adapter or RESERVED_NAME, {}), request.record):
        return []
    more = f" and {len(choices) - SHOWN} more" if len(choices) > SHOWN else ""
    return [
        f"{who} chose among the answers that its training data listed for every question: "
        f"{', '.join(choices[:SHOWN])}{more}; {prefix}choices gives others, {prefix}answer_by generate lets it write"
    ]


def _remarks(
    manifest: Manifest,
    request: Request,
    completion: Completion,
    may_rank: bool,
    prefix: str,
    name: str | None,
) -> list[str]:
    """That there was no image, nothing to choose from, or no word."""
    who, told = name or f"the {RESERVED_NAME}", []
    reads_text = (request.adapter or RESERVED_NAME) in manifest.without_images
    if manifest.vision and not request.record["images"] and not reads_text:
        told.append(f"no {prefix}image: asked about text alone")
    if may_rank and not request.rank and manifest.choices_of(request.adapter, request.record) is None:
        told.append(
            f"{who} was trained to choose among answers, of which none are known for this question; "
            f"{prefix}choices red,green,blue lets it choose, which it does better than writing"
        )
    if not completion.text.strip():
        told.append(f"{who} ended its answer at once: it wrote nothing")
    return told

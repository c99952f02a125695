"""/v1/systemone: typed decisions (System One). A question becomes choices that are ranked, their scores probabilities.

::

    choice  {"red": "like blood", "blue": null}   -> {"choice": "red", "confidence": .., "probabilities": {..}}
    score   ["can wait", "this week", "today"]    -> {"score": 1.4, "legend": {"0": "can wait", ..}, ..}
    noul    yes or no                             -> {"noul": 0.93}

The prompt is the state, the instructions, and a line for every option that has a description; the answers that are
ranked are the options themselves, so that finetunes that were trained to choose are asked as they were trained.

Source: transformers 5.24, ``decision/template_utils.py`` and ``cli/serving/systemone.py``, for the shapes and for the
confidence; probabilities are the softmax of rank classification (`models/token_losses.py`), not of labels' logits.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmpeft.data.choices import check_choices
from mmpeft.data.records import IMAGE_MARKER, Record, place_markers
from mmpeft.errors import RefusedError
from mmpeft.serving.conversation import Posed, plain_text, read_base64, too_many_images
from mmpeft.serving.limits import Limits
from mmpeft.serving.refusals import invalid, require_at_most
from mmpeft.serving.schemas import ChoiceQuestion, DecisionRequest, NoulQuestion, Question, ScoreQuestion

YES, NO = "yes", "no"
"""As data sets of questions about images write them."""


@dataclass
class Decision:
    """One question of a request, ready to be ranked."""

    name: str
    question: Question
    options: list[str]
    """As the answer names them."""
    posed: Posed
    """With what is ranked as its choices, in the order of the options."""

    @property
    def is_settled(self) -> bool:
        """Whether there is only one option."""
        return len(self.options) == 1

    def answer(self, scores: Sequence[float]) -> dict[str, Any]:
        """From the mean log-probability of every choice."""
        shares = softmax(scores)
        by_option = dict(zip(self.options, shares, strict=True))
        if isinstance(self.question, NoulQuestion):
            return {"type": "noul", "noul": by_option["true"]}
        best = shares.index(max(shares))
        if isinstance(self.question, ChoiceQuestion):
            told: dict[str, Any] = {
                "choice": self.options[best],
                "confidence": _above_chance(shares[best], len(shares)),
            }
            return {"type": "choice", **told, "probabilities": by_option}
        return {
            "type": "score",
            "score": sum(level * share for level, share in enumerate(shares)),
            "legend": dict(zip(self.options, self.question.criteria, strict=True)),
            "confidence": _closeness(shares, best),
            "probabilities": by_option,
        }


def read_decisions(asked: DecisionRequest, task: str | None, limits: Limits) -> list[Decision]:
    """The questions of a request, each with its prompt and choices.

    Raises:
        HttpError: one cannot be asked, named by its place.
    """
    require_at_most(len(asked.questions), limits.questions, "questions", "limits.questions")
    require_at_most(len(_text(asked.state)), limits.characters, "state", "limits.characters")
    images = {
        name: read_base64(asset.data_base64, f"assets.{name}.data_base64")
        for name, asset in asked.assets.items()
    }
    if "" in images:
        raise invalid(
            "assets", "assets: a placeholder is empty; name it, and write its name where the image stands"
        )
    return [_decision(name, own, asked, images, task, limits) for name, own in asked.questions.items()]


def _decision(
    name: str,
    question: Question,
    asked: DecisionRequest,
    images: Mapping[str, bytes],
    task: str | None,
    limits: Limits,
) -> Decision:
    where = f"questions.{plain_text(name, 'questions')}"
    options, choices, lines = _options(question)
    require_at_most(len(choices), limits.choices, f"{where}.criteria", "limits.choices")
    if len(choices) > 1:
        try:
            check_choices(choices, f"{where}.criteria")
        except RefusedError as error:
            raise invalid(f"{where}.criteria", str(error)) from None
    for choice in choices:
        plain_text(choice, f"{where}.criteria")
        if any(placeholder in choice for placeholder in images):
            raise invalid(
                f"{where}.criteria", f"{where}.criteria: {choice!r} is an answer, which cannot hold an image"
            )
    told = "\n".join(text for text in (_text(question.instructions), *lines) if text)
    prompt = "\n\n".join(text for text in (_text(asked.state), told) if text)
    text, shown = _with_images(plain_text(prompt, where), list(images))
    if not text.strip():
        raise invalid(where, f"{where}: state and instructions are empty; ask something")
    if len(shown) > limits.images:
        raise too_many_images(len(shown), limits.images, where)
    record = Record(
        id="",
        images=[images[placeholder] for placeholder in shown],
        turns=place_markers([(text, None)], len(shown)),
        task=task,
        choices=choices,
        where=where,
    )
    return Decision(name, question, options, Posed(record, [f"assets.{each}" for each in shown], where))


def _options(question: Question) -> tuple[list[str], list[str], list[str]]:
    """What the answer calls the options, what is ranked, and what the prompt says of them."""
    if isinstance(question, ScoreQuestion):
        levels = [_text(level) for level in question.criteria]
        return [str(number) for number in range(len(levels))], levels, []
    if isinstance(question, NoulQuestion):
        told = question.criteria.model_dump() if question.criteria else {"true": None, "false": None}
        names = {"true": YES, "false": NO}
    else:
        told, names = question.criteria, dict(zip(question.criteria, question.criteria, strict=True))
    lines = [f"{names[option]}: {_text(own)}" for option, own in told.items() if _text(own)]
    return list(names), list(names.values()), lines


def _text(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return json.dumps(content, ensure_ascii=False)


def _with_images(text: str, placeholders: Sequence[str]) -> tuple[str, list[str]]:
    """The text with markers in place of placeholders, and these in their order; a longer one goes before a shorter."""
    if not placeholders:
        return text, []
    pattern = re.compile("|".join(re.escape(name) for name in sorted(placeholders, key=len, reverse=True)))
    return pattern.sub(IMAGE_MARKER, text), pattern.findall(text)


def softmax(scores: Sequence[float]) -> list[float]:
    """Scores as probabilities, as in `metrics/calibration.py`."""
    highest = max(scores)
    weights = [math.exp(score - highest) for score in scores]
    return [weight / sum(weights) for weight in weights]


def _above_chance(share: float, number: int) -> float:
    """0 where the best option is as likely as any, 1 where it is certain."""
    return 1.0 if number == 1 else max(0.0, (share - 1 / number) / (1 - 1 / number))


def _closeness(shares: Sequence[float], best: int) -> float:
    """1 less the mean distance from the best level, in that of levels that are all as likely."""
    if len(shares) == 1:
        return 1.0
    distance = sum(share * abs(level - best) for level, share in enumerate(shares))
    uniform = sum(abs(level - (len(shares) - 1) / 2) for level in range(len(shares))) / len(shares)
    return max(0.0, 1 - distance / uniform)

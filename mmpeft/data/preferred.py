"""Preferences as examples: a chosen answer beside rejected ones, or one answer that people found good or bad."""

from dataclasses import replace
from typing import Literal

from mmpeft.data.formats import DataError
from mmpeft.data.packing import first_target
from mmpeft.data.records import Record, place_of
from mmpeft.data.template import IGNORE_INDEX, NONE_RIGHT, ChoiceSet, Example, Template

Sides = Literal["pairs", "labels"]
"""What every record must have: a rejected answer beside the chosen one; or that, or a label of its only answer."""
WANTED = {
    "pairs": 'give rows a "rejected" answer beside the "chosen" one, or choices',
    "labels": 'give rows a "label" of true or false, or "chosen" and "rejected" answers',
}


def check_sides(record: Record, sides: Sides) -> None:
    """Raises:
    DataError: the record does not say what is preferred.
    """
    if "choices" not in record and not (sides == "labels" and "desirable" in record):
        raise DataError(
            f"{place_of(record)} has one answer, of which nobody says what it is preferred to: {WANTED[sides]}, or "
            "train on such rows with model.objective: likelihood"
        )


def encode_preferred(template: Template, record: Record, sides: Sides) -> ChoiceSet:
    """The record's last question with all its answers.

    Raises:
        DataError: as of `check_sides`, and of `Template.encode_choices`.
    """
    check_sides(record, sides)
    if "choices" in record:
        return template.encode_choices(record)
    only: Record = {**record, "choices": [str(record["turns"][-1][1])]}
    return replace(template.encode_choices(only), right=0 if record.get("desirable") else NONE_RIGHT)


def answers_of_another(asked: Example, told: Example, max_length: int) -> ChoiceSet:
    """The question of one example with the answers of another, cut where they would not fit into a row of
    ``max_length``: of KTO's reference point, an estimate that needs no whole answers."""
    prompt, others = asked.conversations[0], told.conversations
    start = first_target(prompt)
    room = max(1, (max_length - start) // len(others))
    answers = [other.targets[first_target(other) :][:room] for other in others]
    conversations = [
        replace(prompt, ids=[*prompt.ids[: start + 1], *own[:-1]], targets=[IGNORE_INDEX] * start + own)
        for own in answers
    ]
    return ChoiceSet(conversations, None)

"""Choices that questions are known to have: what training data listed for them, and what people type."""

import csv
from collections.abc import Collection, Sequence
from typing import Any

from mmpeft.data.records import IMAGE_MARKER, Record
from mmpeft.errors import RefusedError

MOST = 64
"""Choices of a question, and questions of a task, that are kept; of more, none are."""
UNCLEAR = 2
"""Different sets of one question's choices after which it has none that is known; more are not looked for."""
ANY_QUESTION = ""
KnownChoices = dict[str, dict[str, list[str]]]
"""Task (empty without one) -> question, or `ANY_QUESTION` where all of the task have the same -> its choices; those of
a question that listed none are empty. A task is there only if some of its questions listed choices."""


def known_choices(records: Collection[Record]) -> KnownChoices:
    """What can be known of a question without its row: nothing where equal questions listed different choices, or where
    it would be more than `MOST`."""
    with_choices = {record["task"] or "" for record in records if record.get("choices")}
    listed: dict[str, dict[str, list[list[str]]]] = {}
    for record in records if with_choices else ():
        if (record["task"] or "") not in with_choices:
            continue  # a million questions are not collected for nothing
        sets = listed.setdefault(record["task"] or "", {}).setdefault(_last_question(record), [])
        own = record.get("choices", [])
        if len(sets) < UNCLEAR and not any(_same(own, other) for other in sets):
            sets.append(own)
    return {task: _closed(by_question) for task, by_question in listed.items()}


def choices_of(known: KnownChoices, record: Record) -> list[str] | None:
    """The choices of a record's question: none to choose from is empty, and None is a question of a task that was
    learnt by choosing, whose choices are not known."""
    task = known.get(record["task"] or "")
    return [] if task is None else task.get(ANY_QUESTION, task.get(_last_question(record)))


def are_for_any_question(known: KnownChoices, record: Record) -> bool:
    """Whether its choices are known because all questions of its task had them, be it one of those or not."""
    return ANY_QUESTION in known.get(record["task"] or "", {})


def read_choices(text: str) -> list[str]:
    """The choices that a person typed: ``red,green`` or ``[red, green]``, or a line each; one with
    a comma stands in double quotes."""
    text = text.strip()
    inner = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    rows = csv.reader(inner.splitlines(), skipinitialspace=True)
    return [choice.strip() for row in rows for choice in row]


def check_choices(choices: Any, where: str) -> None:
    """Raises:
    RefusedError: they cannot be ranked.
    """
    texts = (
        isinstance(choices, Sequence)
        and not isinstance(choices, str)
        and all(isinstance(c, str) for c in choices)
    )
    trimmed = [choice.strip() for choice in choices] if texts else []
    if len(trimmed) < 2 or len(set(trimmed)) < len(trimmed) or not all(trimmed):
        raise RefusedError(
            f"{where}: choices must be at least two different, non-empty answers; got {choices!r:.200}"
        )


def _closed(by_question: dict[str, list[list[str]]]) -> dict[str, list[str]]:
    firsts = [sets[0] for sets in by_question.values()]
    clear = {question: sets[0] for question, sets in by_question.items() if len(sets) == 1}
    if len(clear) == len(firsts) and all(_same(own, firsts[0]) for own in firsts):
        clear = {ANY_QUESTION: firsts[0]}
    kept = {question: own for question, own in clear.items() if len(own) <= MOST}
    return kept if len(kept) <= MOST else {}


def _same(one: Sequence[str], other: Sequence[str]) -> bool:
    """Order and outer white space aside."""
    return {text.strip() for text in one} == {text.strip() for text in other}


def _last_question(record: Record) -> str:
    return record["turns"][-1][0].replace(IMAGE_MARKER, "").strip()

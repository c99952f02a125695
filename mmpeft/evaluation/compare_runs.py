"""Two tests of the same questions, compared by what they left on disk, in every metric that scores single answers."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmpeft.errors import RefusedError
from mmpeft.files import read_json_lines
from mmpeft.metrics.answer import Answer
from mmpeft.metrics.intervals import by_images
from mmpeft.metrics.paired import Comparison, compare_scores
from mmpeft.metrics.registry import METRICS, check_metrics, fitting_metrics
from mmpeft.options import command_line

PREDICTIONS = "predictions.jsonl"
EXAMPLES = 3
"""Questions that a refusal names."""
Key = tuple[Any, ...]
"""Identity of a question: id, its text, its images, the right answers, and which of several alike."""


@dataclass
class Tested:
    """What a test answered."""

    name: str
    rows: dict[Key, dict[str, Any]]
    """Question -> its row of predictions.jsonl, in the order of the data."""


@dataclass
class Compared:
    """Two tests beside each other."""

    names: tuple[str, str]
    metrics: dict[str, Comparison]
    unanswered: int
    """Questions that one of them could not be asked, which are left out."""


def read_test(folder: str, finetune: str | None = None) -> Tested:
    """What `mmpeft test` left in a folder.

    Args:
        folder: run directory, or one that results were written into.
        finetune: which of several.

    Raises:
        RefusedError: there is no test, or of several finetunes none is named.
    """
    path = Path(folder, PREDICTIONS)
    if not path.is_file():
        raise RefusedError(
            f"{folder} has no {PREDICTIONS}: name a folder that `mmpeft test` wrote its results into, or test it with "
            f"`{command_line('test', '--run', folder)}`"
        )
    rows = read_json_lines(path)
    if not rows or any("images" not in row for row in rows):
        raise RefusedError(
            f"{path} "
            + (
                "is empty"
                if not rows
                else "does not say which images its questions are about, as of an older mmpeft"
            )
            + f": test it again, with `{command_line('test', '--run', folder)}`"
        )
    if unjudged := [row for row in rows if "truth" not in row or not {"answer", "error"} & row.keys()]:
        raise RefusedError(
            f"{path} has no right answer or no answer for the question of id {unjudged[0].get('id')!r}, as what "
            "`mmpeft predict` writes: wanted what `mmpeft test` wrote"
        )
    there = list(dict.fromkeys(row["adapter"] for row in rows if "adapter" in row))
    if finetune is None and there:
        raise RefusedError(f"{folder} was tested with several finetunes: name one of {', '.join(there)}")
    if finetune is not None and finetune not in there:
        raise RefusedError(
            f"{folder} was not tested with a finetune {finetune!r}; there are: {', '.join(there) or 'no names'}"
        )
    own = [row for row in rows if row.get("adapter") == finetune]
    name = str(folder) if finetune is None else f"{folder}, {finetune}"
    return Tested(name, _by_question(own))


def compare_tests(first: Tested, second: Tested, metrics: Sequence[str] | None = None) -> Compared:
    """Compares them, questions about one image being one cluster.

    Args:
        metrics: by name; None takes those that fit.

    Raises:
        RefusedError: they answered other questions, or a metric does not score single answers.
    """
    _require_same(first, second)
    asked = [key for key in first.rows if all("error" not in own.rows[key] for own in (first, second))]
    if not asked:
        raise RefusedError(f"no question was answered by both {first.name} and {second.name}")
    answers = [[_as_answer(own.rows[key]) for key in asked] for own in (first, second)]
    names = _metrics(answers, metrics)
    clusters = by_images([first.rows[key]["images"] for key in asked])
    found: dict[str, Comparison] = {}
    for name in names:
        scores = METRICS[name].scores
        assert scores is not None, "others were refused or left out"
        found[name] = compare_scores(scores(answers[0]), scores(answers[1]), clusters)
    return Compared((first.name, second.name), found, len(first.rows) - len(asked))


def _metrics(answers: Sequence[Sequence[Answer]], wanted: Sequence[str] | None) -> list[str]:
    """Those that score single answers, and fit both."""
    if wanted is not None and not wanted:
        raise RefusedError("no metric is named; leave --metrics out to take those that fit")
    if wanted is None:
        fitting = [fitting_metrics(own) for own in answers]
        return [name for name in fitting[0] if name in fitting[1] and METRICS[name].scores is not None]
    for own in answers:
        check_metrics(wanted, own)
    for name in wanted:
        if name not in METRICS or METRICS[name].scores is None:
            able = ", ".join(each for each, metric in METRICS.items() if metric.scores is not None)
            raise RefusedError(
                f"{name} scores no single answer, so that two tests cannot be paired; those that do: {able}"
            )
    return list(wanted)


def _by_question(rows: Sequence[dict[str, Any]]) -> dict[Key, dict[str, Any]]:
    found: dict[Key, dict[str, Any]] = {}
    seen: Counter[Key] = Counter()
    for row in rows:
        truths = tuple(row.get("references", [row["truth"]]))
        alike = row["id"], row["question"], tuple(row["images"]), truths
        found[(*alike, seen[alike])] = row
        seen[alike] += 1
    return found


def _require_same(first: Tested, second: Tested) -> None:
    """Raises:
    RefusedError: one was asked what the other was not; some of those are named.
    """
    told = []
    for own, other in ((first, second), (second, first)):
        if only := [key for key in own.rows if key not in other.rows]:
            named = "; ".join(_told(key, other) for key in only[:EXAMPLES])
            told.append(
                f"{len(only):,} of {len(own.rows):,} questions of {own.name} are not in {other.name}, such as {named}"
            )
    if told:
        raise RefusedError(
            "both must have answered the same questions:\n"
            + "\n".join(told)
            + "\nTest both on the same data.test"
        )


def _told(key: Key, other: Tested) -> str:
    """A question by its id, and in what one of this id is different."""
    names = ("id", "question", "images", "right answers")
    near = [each for each in other.rows if each[0] == key[0]]
    if not near:
        return f"id {key[0]!r} ({str(key[1]).strip()!r:.80})"
    least = min(([n for n, a, b in zip(names, key, each, strict=False) if a != b] for each in near), key=len)
    return f"id {key[0]!r} (another {' and '.join(least) or 'number of them'})"


def _as_answer(row: dict[str, Any]) -> Answer:
    scores = row.get("scores")
    return Answer(
        id=str(row["id"]),
        where=PREDICTIONS,
        prediction=row["answer"],
        references=row.get("references", [row["truth"]]),
        choices=None if scores is None else list(scores),
        scores=None if scores is None else list(scores.values()),
    )

"""Some held-out questions with the model's answers, for people to look at: ``examples/`` of a run directory."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmpeft.data.images import ImageConfig, load_image
from mmpeft.data.records import IMAGE_MARKER, Record
from mmpeft.inference.engine import Engine
from mmpeft.inference.requests import Request

NUM_EXAMPLES = 12
QUESTIONS_FOR_EXAMPLES = 8 * NUM_EXAMPLES
"""Answers among which examples are chosen after a training."""


def some_answers(engine: Engine, requests: Sequence[Request]) -> dict[int, str]:
    """Answers to the first batches of questions, enough to choose examples from: number -> text."""
    refused, works = engine.plan(requests)
    if refused:  # a question that trains may be too long with all its choices
        print(f"{len(refused)} questions are not among the examples: {refused[0][1].error}")
    answers: dict[int, str] = {}
    for work in works:
        answers |= {number: own.text for number, own in engine.run(work, requests) if own.error is None}
        if len(answers) >= QUESTIONS_FOR_EXAMPLES:
            break
    return answers


def write_examples(
    directory: Path, records: Sequence[Record], answers: Mapping[int, str], config: ImageConfig
) -> None:
    """Examples spread over the answered ones, with their images as the run reads them, so that the directory can be
    moved. "alone" are those of which all that was read are images and the question."""
    folder = directory / "examples"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    numbers = sorted(answers)
    count = min(NUM_EXAMPLES, len(numbers))
    numbers = [numbers[n * len(numbers) // count] for n in range(count)]
    with (folder / "examples.jsonl").open("w") as file:
        for place, number in enumerate(numbers):
            record = records[number]
            *earlier, (question, truth) = record["turns"]
            names = [f"{place:02d}{f'_{n}' if n else ''}.png" for n in range(len(record["images"]))]
            for name, image in zip(names, record["images"], strict=True):
                load_image(image, config).save(folder / name)
            row = {
                "image": names[0] if names else None,
                "images": names,
                "question": question.replace(IMAGE_MARKER, "").strip(),
                "asked": _asked(question, len(names)),
                "alone": not (earlier or "system" in record or "times" in record),
                "task": record["task"],
            }
            file.write(json.dumps(row | {"truth": truth, "answer": answers[number]}) + "\n")


def _asked(question: str, images: int) -> str:
    """As it is asked again: with the markers of images that do not come first."""
    plain = question.removeprefix(IMAGE_MARKER * images)
    return question if IMAGE_MARKER in plain or not plain.strip() else plain

"""Ranking all answers that a data set knows, beside writing one greedy answer to the same question.

One question at a time and 16 in a batch, each about another image.
"""

import random
from collections.abc import Iterator

import mmpeft
from benchmarks.race import Race, Run
from mmpeft.data.records import IMAGE_MARKER
from mmpeft.data.sources import load_records
from mmpeft.paths import resolve

BATCHES = (1, 16)


def ranking(
    run: str = "runs/quickstart",
    data: str = "embedded/easy-vqa/test.jsonl",
    image_root: str | None = None,
    seed: int = 0,
) -> Iterator[Race]:
    """`rank` of every answer in the data against `ask`.

    Args:
        run: directory that `mmpeft fit` wrote.
        data: questions; their different answers are the candidates.
        image_root: folder that image names are relative to; the data file's by default.
        seed: which questions.
    """
    vlm = mmpeft.load(run)
    records = load_records(resolve(data), image_root=image_root)
    answers = sorted({str(record["turns"][-1][1]).strip() for record in records})
    by_image = {record["images"][0]: record for record in records}
    chosen = random.Random(seed).sample(sorted(by_image), max(BATCHES))
    questions = [by_image[image]["turns"][-1][0].replace(IMAGE_MARKER, "") for image in chosen]
    for size in BATCHES:
        images, asked = chosen[:size], questions[:size]
        runs: dict[str, Run] = {
            "ask": lambda images=images, asked=asked: vlm.ask(images, asked),
            "rank": lambda images=images, asked=asked: vlm.rank(images, asked, answers),
        }
        title = f"{size} questions, {len(answers)} candidates"
        yield Race(title, runs, ("ask",), "questions/s", amount=size, repeats=9)

"""Ranking all answers that a data set knows, beside writing one greedy answer to the same question.

One question at a time and 16 in a batch, each about another image. Cases alternate in one process; one JSON line per
case with medians.

    python benchmarks/ranking.py --run runs/quickstart --repeats 9
"""

import random
from collections.abc import Callable
from typing import Any

from jsonargparse import auto_cli
from timing import alternate, report

import mmpeft
from mmpeft.data.records import IMAGE_MARKER
from mmpeft.data.sources import load_records
from mmpeft.paths import resolve
from mmpeft.training.malloc import keep_freed_memory

BATCHES = (1, 16)


def ranking(
    run: str = "runs/quickstart",
    data: str = "embedded/easy-vqa/test.jsonl",
    image_root: str | None = None,
    repeats: int = 9,
    seed: int = 0,
) -> None:
    """Times `rank` of every answer in the data against `ask`.

    Args:
        run: directory that `mmpeft fit` wrote.
        data: questions; their different answers are the candidates.
        image_root: folder that image names are relative to; the data file's by default.
        repeats: rounds over all cases.
        seed: which questions.
    """
    keep_freed_memory()
    vlm = mmpeft.load(run)
    records = load_records(resolve(data), image_root=image_root)
    answers = sorted({str(record["turns"][-1][1]).strip() for record in records})
    by_image = {record["images"][0]: record for record in records}
    chosen = random.Random(seed).sample(sorted(by_image), max(BATCHES))
    questions = [by_image[image]["turns"][-1][0].replace(IMAGE_MARKER, "") for image in chosen]
    cases: dict[str, Callable[[], Any]] = {}
    for size in BATCHES:
        images, asked = chosen[:size], questions[:size]
        cases[f"rank {size}"] = lambda i=images, q=asked: vlm.rank(i, q, answers)
        cases[f"ask {size}"] = lambda i=images, q=asked: vlm.ask(i, q)
    seconds = alternate(cases, repeats)
    for name, median in seconds.items():
        size = int(name.split()[1])
        report(
            case=name,
            questions=size,
            candidates=len(answers),
            ms_per_question=round(1000 * median / size, 1),
            times_greedy=round(median / seconds[f"ask {size}"], 2),
        )


if __name__ == "__main__":
    auto_cli(ranking)

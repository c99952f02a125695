"""What a finetune adds to the time of an answer: one batch, answered by the finetune and by its base in turn.

The base is a model of its own without adapters. Every question has a row of its own and both write the same number
of tokens: who says less would seem faster.
"""

from collections.abc import Callable, Iterator
from typing import Any

import mmpeft
from benchmarks.race import Race
from mmpeft.data.batch import collate
from mmpeft.data.encoding import encode_images
from mmpeft.data.layouts.columns import Columns
from mmpeft.data.layouts.notes import Notes
from mmpeft.data.packing import pack
from mmpeft.data.sources import load_records
from mmpeft.inference.decoding import generate
from mmpeft.inference.vlm import load_base
from mmpeft.models.multimodal import MultimodalModel
from mmpeft.paths import resolve

NO_TOKEN = -1


def answering(
    run: str = "runs/quickstart",
    data: str = "embedded/easy-vqa/test.jsonl",
    task: str | None = None,
    image_root: str | None = None,
    questions: int = 32,
    tokens: int = 4,
    columns: dict[str, str] | None = None,
    ignore: list[str] | None = None,
) -> Iterator[Race]:
    """The first finetune of a run beside its base.

    Args:
        run: directory that `mmpeft fit` wrote.
        data: questions, as in the configs' data.test.
        task: identifier of questions that have none.
        image_root: folder that image paths start from; by default the data file's.
        questions: rows of the batch, the first of the data.
        tokens: written for each question.
        columns: as the configs' data.columns.
        ignore: as the configs' data.ignore.
    """
    given, found = (
        Columns(columns or {}, ignore or []),
        Notes(),
    )  # of all data: not each must have every column
    read = load_records(resolve(data), given, image_root=image_root, task=task, notes=found)
    records: list[Any] = read[:questions]
    vlm = mmpeft.load(run)
    rows = [pack([vlm.template.encode_prompt(record)]) for record in records]
    images = [image for row in rows for image in row.images]
    features = encode_images(vlm.model.vision_encoder, images) if images else None

    def answers(model: MultimodalModel, adapter: str | None) -> Callable[[], Any]:
        batch = collate(rows, features, [adapter] * len(rows)).to(model.device)
        return lambda: generate(model, batch, NO_TOKEN, tokens)

    base = load_base(run, vlm.model.device)
    runs = {"base": answers(base, None), "finetune": answers(vlm.model, vlm.adapters[0])}
    facts = {"answers": len(rows), "language_model": base.language_model.num_parameters()}
    yield Race(f"{len(rows)} answers of {tokens} tokens", runs, ("base",), repeats=9, facts=facts)

"""Captions alone, one text an image: epochs after the first, whose features are on disk."""

from collections.abc import Iterator

from benchmarks.race import Race
from benchmarks.recipe import Recipe, embedded_vision
from mmpeft.data.plan import PackingConfig


def captions(rows: int = 160) -> Iterator[Race]:
    """Epochs of easy-VQA's captions.

    Args:
        rows: captions.
    """
    data, packing = "embedded/easy-vqa/captions_train.jsonl", PackingConfig(batch_size=40)
    yield Recipe(data, rows, embedded_vision(), packing, epochs=2).race("captions", "captions/s")

"""Text alone: what functions of Python's library do, as in configs/text/lora.yaml."""

from collections.abc import Iterator

from benchmarks.race import Race
from benchmarks.recipe import Recipe
from mmpeft.data.plan import PackingConfig


def text(rows: int = 160) -> Iterator[Race]:
    """Epochs of the docstrings.

    Args:
        rows: question and answer each.
    """
    packing = PackingConfig(32, 4, 256)
    yield Recipe("embedded/docstrings/train.jsonl", rows, None, packing).race("text alone", "texts/s")

"""The easy-VQA recipe: questions a second of whole epochs with the optimiser, ours and transformers' `Trainer`'s."""

from collections.abc import Iterator

from benchmarks.race import Race
from benchmarks.recipe import Recipe, embedded_vision
from mmpeft.data.plan import PackingConfig


def easy_vqa(rows: int = 240, max_conversations: int = 16) -> Iterator[Race]:
    """Epochs of the embedded model.

    Args:
        rows: questions, some nine about an image.
        max_conversations: of them in one of our rows.
    """
    packing = PackingConfig(40, max_conversations)
    yield Recipe("embedded/easy-vqa/train.jsonl", rows, embedded_vision(), packing).race("easy-VQA")

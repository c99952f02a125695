"""256 image tokens and some ten questions an image, on the embedded language model."""

from collections.abc import Iterator

from benchmarks.race import Race
from benchmarks.recipe import Recipe, embedded_vision
from mmpeft.data.plan import PackingConfig


def many_questions(rows: int = 80) -> Iterator[Race]:
    """Epochs of easy-VQA's images at 512 pixels.

    Args:
        rows: questions, some nine about an image.
    """
    vision, packing = embedded_vision(image_size=512), PackingConfig(batch_size=20)
    yield Recipe("embedded/easy-vqa/train.jsonl", rows, vision, packing).race("256 image tokens")

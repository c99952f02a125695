"""A Llama-shaped model of 1.2B in bf16 behind ViT-L/14: training steps with LoRA, ours and peft's."""

from collections.abc import Iterator

from benchmarks.gpu import races, shapes, step_race
from benchmarks.race import Race

IMAGES = {1: 16, 10: 2}
"""Questions of an image -> images of a step."""


def gpu_1b(tiny: bool = False) -> Iterator[Race]:
    """Forward and backward with 256 and 576 image tokens, 1 and 10 questions an image.

    Args:
        tiny: small shapes, to see on any machine that it runs.
    """
    yield from races(step_race, shapes("1.2B", IMAGES, tiny, quantised=False))

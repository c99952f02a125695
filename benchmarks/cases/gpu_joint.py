"""Eight LoRA finetunes of a Llama-shaped model of 1.2B in bf16: a step of all, beside a step of each."""

from collections.abc import Iterator

from benchmarks.gpu import joint_race, races, shapes
from benchmarks.race import Race

IMAGES = {1: 2, 10: 1}
"""Questions of an image -> images of a finetune's step."""


def gpu_joint(tiny: bool = False) -> Iterator[Race]:
    """Forward and backward with 256 and 576 image tokens, 1 and 10 questions an image.

    Args:
        tiny: small shapes, to see on any machine that it runs.
    """
    yield from races(joint_race, shapes("1.2B", IMAGES, tiny))

"""The encoder's settings, as configs and runs hold them; read without torch."""

from dataclasses import dataclass, field
from typing import Literal

from mmpeft.data.images import ImageConfig
from mmpeft.errors import RefusedError, require_positive

Pooling = Literal["none", "average", "pixel_shuffle", "consecutive"]
Fit = Literal["crop", "pad", "squash", "tile"]
WHOLE = ("crop", "pad", "squash")
"""The fits under which every image has as many tokens as any other."""


@dataclass
class VisionConfig:
    """Which encoder, and what becomes of its features."""

    name: str = "tf_efficientnet_lite0"
    """Name of a timm model."""
    weights: str | None = None
    """Local safetensors in timm's key names; without it timm fetches the pretrained weights."""
    layer: int = -1
    """Which of the model's feature levels (blocks of a ViT, stages of a CNN), counted as in a list. In some models more
    follows the last level before the head (`docs/encoders.md`; `mmpeft check DATA --encoder NAME` says it of one)."""
    pooling: Pooling = "none"
    """How neighbouring tokens become one: "average" of a square, "pixel_shuffle" (a 2x2 square's channels side
    by side), or "consecutive" (MiniGPT-v2: a run of tokens in reading order side by side)."""
    pool: int = 2
    """Side of the square, or length of the run for "consecutive" (MiniGPT-v2: 4)."""
    image_size: int | None = None
    """Side of a square in pixels; None is the model's own. One whose border the model would not see is refused."""
    fit: Fit = "crop"
    """How an image of another shape becomes the encoder's: "crop", as the model's own evaluation transform, cuts off
    what sticks out; "pad" keeps the shape and fills up with the mean colour; "squash" squeezes the whole image in."""
    image: ImageConfig = field(default_factory=ImageConfig)
    """How image files become pixels: more than 8 bits, frames, limits."""
    feature_dtype: Literal["float16", "bfloat16"] = "float16"
    """What features are rounded to, in the cache on disk and without it: bfloat16 for an encoder whose features go
    beyond float16's 65,504."""
    crop: bool | None = None
    """Has moved to fit: true is "crop", false is "squash"."""

    def __post_init__(self):
        if isinstance(self.image, dict):  # from a manifest
            self.image = ImageConfig(**self.image)
        if self.crop is not None:
            moved: Fit = "crop" if self.crop else "squash"
            if self.fit not in ("crop", moved):
                raise RefusedError(
                    f"vision.crop ({self.crop}) is an old name of vision.fit ({self.fit}), and both are given; keep fit"
                )
            self.fit, self.crop = moved, None
        if self.fit not in WHOLE:
            raise RefusedError(
                f"vision.fit is {self.fit!r}, which would give images different numbers of tokens and is not there; "
                f"wanted one of {', '.join(WHOLE)}: set pad with a larger image_size, or give the parts of an image as "
                "several images"
            )
        for name in ("pool", "image_size"):
            require_positive(f"vision.{name}", getattr(self, name))

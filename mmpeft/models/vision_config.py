"""The encoder's settings, as configs and runs hold them; read without torch."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from mmpeft.data.images import ImageConfig
from mmpeft.errors import RefusedError, require_positive

Pooling = Literal["none", "average", "pixel_shuffle", "consecutive"]
Fit = Literal["crop", "pad", "squash", "tile"]
MOST_TILES = 4
"""LLaVA-NeXT's."""


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
    what sticks out; "pad" keeps the shape and fills up with the mean colour; "squash" squeezes the whole image in;
    "tile" cuts it into squares of the encoder's size behind an overview, as many as suit its shape
    (`models/tiling.py`): images of different shapes then have different numbers of tokens."""
    max_tiles: int | None = None
    """Under "tile", squares that an image may be cut into beside its overview; None is 4."""
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
        if self.fit not in get_args(Fit):
            raise RefusedError(f"vision.fit is {self.fit!r}; wanted one of {', '.join(get_args(Fit))}")
        self._check_tiles()
        for name in ("pool", "image_size"):
            require_positive(f"vision.{name}", getattr(self, name))

    def _check_tiles(self) -> None:
        if self.fit != "tile":
            if self.max_tiles is not None:
                raise RefusedError(
                    f"vision.max_tiles is {self.max_tiles}, but vision.fit is {self.fit}, which makes no tiles; set "
                    "fit to tile, or leave max_tiles out"
                )
            return
        self.max_tiles = MOST_TILES if self.max_tiles is None else self.max_tiles
        if self.max_tiles < 2:
            raise RefusedError(
                f"vision.max_tiles is {self.max_tiles}, which cuts nothing; wanted 2 or more, or vision.fit squash"
            )
        if self.pooling == "consecutive":
            raise RefusedError(
                "vision.fit tile puts the tokens of tiles side by side, and those of vision.pooling consecutive lie in "
                "no grid; set pooling to average, pixel_shuffle or none"
            )

"""How image files become pixels: a setting of the encoder, so that a run keeps it and is asked as it was trained."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mmpeft.errors import RefusedError

PILLOW_PIXELS = 178_956_970
"""Above it pillow itself refuses an image."""
IDENTITY = ("scale", "frame", "background")
"""The settings that change pixels; the others only refuse."""
NUMBERS = {"file": 0, "percentile": 0, "fixed": 2, "window": 2}
"""Kind of scale -> how many numbers follow it."""


@dataclass
class ImageConfig:
    """Images of more than 8 bits, of several frames, transparent or large ones."""

    scale: str = "file"
    """How samples of more than 8 bits become 0..255. "file": by the window that a DICOM or NIfTI file states, else from
    the image's own minimum to its maximum; "percentile": from its 1st to its 99th percentile; "fixed:LO:HI": from LO to
    HI, the same in every image; "window:C:W": DICOM's window of centre C and width W, in Hounsfield units for CT."""
    frame: Literal["first", "middle"] = "first"
    """Which of several frames, pages or slices, where a name does not say it as `scan.dcm#frame=3` does (counted from
    0)."""
    background: tuple[int, int, int] = (255, 255, 255)
    """RGB colour, 0..255, under transparent pixels."""
    max_pixels: int = 128_000_000
    """Largest image, width x height."""
    max_bytes: int = 2**29
    """Largest file, in bytes; of a compressed scan also what is in it. Videos are not read whole and may be larger."""
    max_seconds: float = 60.0
    """Longest that decoding one image may take where many are read at once, as captions are."""

    def __post_init__(self):
        self.background = tuple(self.background)  # pyright: ignore[reportAttributeAccessIssue] JSON has lists
        parse_scale(self.scale)
        if self.frame not in ("first", "middle"):
            raise RefusedError(
                f"image.frame is {self.frame!r}; wanted first or middle, or a name such as a.dcm#frame=3"
            )
        if len(self.background) != 3 or not all(0 <= value <= 255 for value in self.background):
            raise RefusedError(f"image.background is {self.background}; wanted three numbers of 0 to 255")
        for name in ("max_pixels", "max_bytes", "max_seconds"):
            if not getattr(self, name) > 0:
                raise RefusedError(f"image.{name} is {getattr(self, name)}; it must be above 0")
        if self.max_pixels > PILLOW_PIXELS:
            raise RefusedError(
                f"image.max_pixels is {self.max_pixels:,}; pillow refuses images above {PILLOW_PIXELS:,}"
            )

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that change pixels and are not the default: empty for most runs."""
        own, default = asdict(self), asdict(ImageConfig())
        plain = own | {"background": list(self.background)}
        return {name: plain[name] for name in IDENTITY if own[name] != default[name]}


def parse_scale(scale: str) -> tuple[str, list[float]]:
    """The kind of scale and its numbers.

    Raises:
        RefusedError: an unknown kind, or numbers that do not fit it.
    """
    kind, *words = str(scale).split(":")
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        numbers = [math.nan]
    if len(numbers) != NUMBERS.get(kind) or not all(map(math.isfinite, numbers)):
        raise RefusedError(
            f"image.scale is {scale!r}; wanted file, percentile, fixed:LO:HI such as fixed:0:4095, or "
            "window:CENTRE:WIDTH such as window:40:400"
        )
    if kind == "fixed" and numbers[0] >= numbers[1]:
        raise RefusedError(f"image.scale is {scale!r}; LO must be below HI")
    if kind == "window" and numbers[1] < 1:
        raise RefusedError(f"image.scale is {scale!r}; a window is at least 1 wide")
    return kind, numbers

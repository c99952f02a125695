"""An encoder of no weights that counts, for the tests of the feature cache."""

import time

import torch

from mmpeft.data.encoding import FEATURE_DTYPE
from mmpeft.data.images import ImageConfig


class CountingEncoder:
    """Features that are a function of the image alone, and the number of images encoded so far."""

    image_config = ImageConfig()

    def __init__(
        self, layer: int = 0, stop_after: int | None = None, seconds: float = 0, dtype=FEATURE_DTYPE
    ):
        self.fingerprint = {"name": "counting", "weights": "abc", "layer": layer}
        self.encoded, self.stop_after, self.seconds = 0, stop_after, seconds
        self.num_tokens, self.dim, self.feature_dtype = 2, 3, dtype

    def transform(self, image):
        if self.stop_after is not None and self.encoded >= self.stop_after:
            raise KeyboardInterrupt
        self.encoded += 1
        time.sleep(self.seconds)
        return torch.tensor(image.getpixel((0, 0)), dtype=torch.float32)

    def __call__(self, pixels):
        return (pixels / 7 + self.fingerprint["layer"])[:, None].expand(-1, 2, -1).sqrt()

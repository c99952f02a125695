"""How many bytes the features of images take."""

from collections.abc import Sequence

from mmpeft.data.encoder import Encoder, dtype_name
from mmpeft.data.image_tokens import image_tokens
from mmpeft.data.images import ImageLike
from mmpeft.errors import RefusedError


class Footprint:
    """Of one encoder's features."""

    def __init__(self, encoder: Encoder):
        self.image_tokens = image_tokens(encoder)
        """Of every image, or what tells them of one."""
        self._token_bytes = encoder.dim * encoder.feature_dtype.itemsize
        self._of_a_token = f"{encoder.dim:,} in {dtype_name(encoder)}"

    @property
    def most(self) -> int:
        """Bytes of one image, at most."""
        tokens = self.image_tokens
        return self._token_bytes * (tokens if isinstance(tokens, int) else tokens.tiling.most_tokens)

    def of(self, images: Sequence[ImageLike]) -> tuple[int, str]:
        """Bytes of some images, and the sum in words. One that cannot be read has none; encoding it tells."""
        tokens = self.image_tokens
        if isinstance(tokens, int):
            each = tokens * self._token_bytes
            told = f"{len(images):,} images x {each:,} bytes ({tokens:,} tokens x {self._of_a_token})"
            return len(images) * each, told
        total = 0
        for image in images:
            try:
                total += tokens(image)
            except RefusedError:
                continue
        return total * self._token_bytes, f"{len(images):,} images of {total:,} tokens x {self._of_a_token}"

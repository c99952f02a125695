"""Encoding: what the transform made of some images -> their features under a frozen encoder, of which none is NaN or
infinite."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor

from mmpeft.data.encoder import Encoder, dtype_name, images_at_once, stacked, tiling_of
from mmpeft.data.image_tokens import Decode
from mmpeft.data.images import ImageLike, image_key, load_image
from mmpeft.errors import RefusedError

FEATURE_DTYPE = torch.float16
"""What features are unless the encoder says otherwise, cached or not: rounding both the same way makes cached equal
uncached."""
NOTHING_DECODED: Mapping[str, Any] = MappingProxyType({})
Item = TypeVar("Item")


@torch.no_grad()
def encode(encoder: Encoder, pixels: Sequence[Any], stream: Any = None) -> list[Tensor | RefusedError]:
    """The features of every image from what the encoder's transform made of it, or why they cannot be kept; on a
    ``stream`` of the GPU."""
    with torch.cuda.stream(stream):
        if encoder.num_tokens is None:
            every = [own.to(encoder.feature_dtype) for own in tiling_of(encoder).encode(encoder, pixels)]
            finite = torch.stack([torch.isfinite(own).all() for own in every]).tolist()
            features = [own.cpu() for own in every]
        else:
            together = encoder(torch.stack(list(pixels))).to(encoder.feature_dtype)
            finite = torch.isfinite(together).flatten(1).all(1).tolist()
            features = list(together.cpu())
    refusal = RefusedError(
        f"the vision encoder gave features that are NaN or beyond {dtype_name(encoder)}'s "
        f"{torch.finfo(encoder.feature_dtype).max:.5g}; choose a layer with its norm, or set "
        "model.vision.feature_dtype to bfloat16"
    )
    return [own if fits else refusal for own, fits in zip(features, finite, strict=True)]


def encode_images(
    encoder: Encoder, images: Sequence[ImageLike], batch_size: int = 64
) -> Tensor | list[Tensor]:
    """(images, image tokens, vision dim) in the encoder's `feature_dtype`, or (image tokens, vision dim) of each where
    their number differs, now; an image that comes twice once.

    Raises:
        RefusedError: an image cannot be read, or a feature is too large for it or not a number.
    """
    config = encoder.image_config
    keys = [image_key(image, config) for image in images]
    different = list(dict(zip(keys, images, strict=True)).values())
    parts, batch_size = [], images_at_once(encoder, batch_size)
    for start in range(0, len(different), batch_size):
        chunk = different[start : start + batch_size]
        for own in encode(encoder, [encoder.transform(load_image(image, config)) for image in chunk]):
            if isinstance(own, RefusedError):
                raise own
            parts.append(own)
    places = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    return stacked([parts[places[key]] for key in keys])


class ImageEncoding:
    """From images to features: the next ones are decoded while some are encoded."""

    def __init__(self, encoder: Encoder):
        self.encoder = encoder
        self.decode: Decode = load_image
        """What reads an image; where many of unknown origin are, the `load` of an `ImageWorker` takes its place."""
        self.seconds = 0.0
        """Time in the encoder so far."""

    def pixels(self, image: ImageLike) -> Any:
        """What the encoder gets of an image."""
        return self.encoder.transform(self.decode(image, self.encoder.image_config))

    def each(
        self,
        images: Mapping[str, ImageLike],
        decoded: Mapping[str, Any] = NOTHING_DECODED,
        batch_size: int = 64,
    ) -> Iterator[tuple[str, Tensor | RefusedError]]:
        """Key -> features (image tokens, vision dim), or why the image cannot be read.

        Args:
            images: key -> image.
            decoded: key -> the pixels of an image, or why there are none, of those that were decoded already.
            batch_size: pictures that the encoder gets together.
        """
        keys, batch_size = list(images), images_at_once(self.encoder, batch_size)
        batches = [keys[start : start + batch_size] for start in range(0, len(keys), batch_size)]

        def decode(batch: list[str]) -> dict[str, Any]:
            return {
                key: decoded[key] if key in decoded else or_refused(self.pixels, images[key]) for key in batch
            }

        with ThreadPoolExecutor(1) as decoder:
            coming = decoder.submit(decode, batches[0]) if batches else None
            for following in [*batches[1:], None]:
                pixels = coming.result() if coming else {}
                coming = decoder.submit(decode, following) if following else None
                readable = {key: each for key, each in pixels.items() if not isinstance(each, RefusedError)}
                if readable:
                    begun = time.perf_counter()
                    features = encode(self.encoder, list(readable.values()), self._stream)
                    self.seconds += time.perf_counter() - begun
                    yield from zip(readable, features, strict=True)
                yield from ((key, each) for key, each in pixels.items() if isinstance(each, RefusedError))

    @cached_property
    def _stream(self) -> Any:
        """Where a GPU encodes beside the step, in whichever thread; None without one."""
        if not torch.cuda.is_available():
            return None
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())  # until the encoder is there
        return stream


def or_refused(action: Callable[[ImageLike], Item], image: ImageLike) -> Item | RefusedError:
    """What an action makes of an image, or why it refuses it."""
    try:
        return action(image)
    except RefusedError as error:
        return error

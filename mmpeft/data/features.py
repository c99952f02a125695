"""Features of images under a frozen encoder, which sees each image once: from disk, from memory, or encoded now.

On disk they are kept per encoder in ``<directory>/<encoder>/`` (`feature_cache.encoder_folder`). An entry's key is
(encoder weights, layer, pooling, transform; bytes of the image), so a changed image or encoder misses the cache
instead of hitting a wrong entry. Shards are written whole under a lock: a killed build goes on where it stopped, two
builds do not clash.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import RLock
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from mmpeft.data.feature_cache.encoder_folder import EARLIER, tell
from mmpeft.data.feature_cache.image_keys import ImageKeys
from mmpeft.data.feature_cache.settings import room
from mmpeft.data.feature_cache.shard_file import rows_per_shard
from mmpeft.data.feature_cache.store import FeatureStore
from mmpeft.data.images import ImageConfig, ImageLike, image_key, load_image
from mmpeft.errors import RefusedError
from mmpeft.progress_bar import progress_bar

FEATURE_DTYPE = torch.float16
"""What features are unless the encoder says otherwise, cached or not: rounding both the same way makes cached equal
uncached."""
LAYOUT = 2
"""Of the files. Another layout has other folders, so that none is misread."""
SHARD_IMAGES = 4096
KEPT_BYTES = 2**28
"""Features in memory of images that are not on disk: 145,000 of the embedded encoder, 220 of 576 tokens of 1,024."""
DOING = "encoding images"
IN_THE_STEP = "Images are encoded in the step that needs them, again in each epoch"
Item = TypeVar("Item")


class Encoder(Protocol):
    """What the cache needs of a vision encoder."""

    fingerprint: dict[str, Any]
    image_config: ImageConfig
    num_tokens: int
    dim: int

    @property
    def feature_dtype(self) -> torch.dtype: ...

    def transform(self, image: Any) -> Tensor: ...

    def __call__(self, pixels: Tensor) -> Tensor: ...


class FeatureCache:
    """Features of images under one encoder: once per content, from disk, from memory, or encoded now.

    `build` keeps them on disk for good. Any other image is encoded when it is asked for and kept in memory, the
    latest `KEPT_BYTES` of them, so that a million images to be captioned fill no disk.

    Args:
        directory: of the features of all encoders; None keeps nothing on disk.
        max_gb: see `CacheConfig.max_gb`.

    Raises:
        RefusedError: the folder belongs to another encoder, layer, pooling or transform; the message names the
            fields that differ.
    """

    def __init__(self, directory: str | Path | None, encoder: Encoder, max_gb: float | None = None):
        self.encoder, self.max_gb = encoder, max_gb
        self.decode = load_image
        """What reads an image; where many of unknown origin are, the `load` of an `ImageWorker` takes its place."""
        root = None if directory is None else Path(directory)
        self.key = ImageKeys(root, encoder.image_config)
        """An image's identity by its content; a file is read once, and again when it has changed."""
        name, shape = _name({"layout": LAYOUT, **encoder.fingerprint}), (encoder.num_tokens, encoder.dim)
        self.store = None if root is None else FeatureStore(root / name, encoder.fingerprint, shape)
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self._kept_bytes = 0
        self._lock = RLock()  # batches are made in threads of their own

    @property
    def directory(self) -> Path:
        """Of this encoder's features."""
        assert self.store is not None, "asked for where there is one"
        return self.store.directory

    def build(self, images: Iterable[ImageLike], batch_size: int = 64, skip_unreadable: bool = False) -> int:
        """Encodes what is not on disk yet, for good, and says before how much that is. Where there is no room for it,
        that is said, and nothing is written.

        Args:
            images: of any number of duplicates.
            batch_size: images that the encoder gets together.
            skip_unreadable: leave those out that cannot be read, for whoever asks for them.

        Returns:
            The number of images encoded.

        Raises:
            RefusedError: an image cannot be read, or the disk is full.
        """
        wanted: dict[str, ImageLike] = {}
        for image in images:
            key = _or_refused(self.key, image)
            if isinstance(key, str):
                wanted[key] = image
            elif not skip_unreadable:
                raise key
        self.key.flush()
        missing = sum(self._on_disk(key) is None for key in wanted)
        if self.store is None or not missing or not self._fits(missing):
            return 0
        with self.store.writing(wanted) as left, progress_bar(DOING, "image", len(left)) as update:
            encoded, size = 0, min(SHARD_IMAGES, rows_per_shard(self._image_bytes))
            for start in range(0, len(left), size):
                part = {key: wanted[key] for key in left[start : start + size]}
                features = self._readable(part, batch_size, skip_unreadable)
                encoded += self.store.add(list(part), _counted(features, update))
        return encoded

    def __call__(self, images: Sequence[ImageLike]) -> Tensor:
        """(images, image tokens, vision dim) in the encoder's `feature_dtype`.

        Raises:
            RefusedError: one of them cannot be read.
        """
        loaded = self.load(images)
        for features in loaded:
            if isinstance(features, RefusedError):
                raise features
        return torch.stack(loaded)  # pyright: ignore[reportArgumentType]

    def holds(self, image: ImageLike) -> bool:
        """Whether an image's features are at hand, so that it need not be decoded.

        Raises:
            ImageError: it cannot be named, see `key`.
        """
        key = self.key(image)
        return key in self._kept or self._on_disk(key) is not None

    def load(self, images: Sequence[ImageLike]) -> list[Tensor | RefusedError]:
        """The features (image tokens, vision dim) of every image, or why it has none; one does not harm another."""
        with self._lock:
            return self._load(images)

    def _load(self, images: Sequence[ImageLike]) -> list[Tensor | RefusedError]:
        keys = [_or_refused(self.key, image) for image in images]
        by_key = {key: image for key, image in zip(keys, images, strict=True) if isinstance(key, str)}
        store = self.store
        if store and (damaged := {key: image for key, image in by_key.items() if store.is_lost(key)}):
            self.build(damaged.values(), skip_unreadable=True)
            store.give_up(damaged)  # those that did not fit are encoded as others are
        found: dict[str, Tensor | RefusedError] = {}
        for key in by_key:
            if (own := self._on_disk(key)) is not None or (own := self._kept.get(key)) is not None:
                found[key] = own
        missing = {key: image for key, image in by_key.items() if key not in found}
        encoded = dict(self._encode_each(missing))
        self._keep({key: own for key, own in encoded.items() if isinstance(own, Tensor)})
        found |= encoded
        return [key if isinstance(key, RefusedError) else found[key] for key in keys]

    def _encode_each(
        self, images: dict[str, ImageLike], batch_size: int = 64
    ) -> Iterator[tuple[str, Tensor | RefusedError]]:
        """Key -> features, or why the image cannot be read. The next images are decoded meanwhile."""
        keys = list(images)
        batches = [keys[start : start + batch_size] for start in range(0, len(keys), batch_size)]

        def decode(batch: list[str]) -> dict[str, Tensor | RefusedError]:
            return {key: _or_refused(self._pixels, images[key]) for key in batch}

        with ThreadPoolExecutor(1) as decoder:
            coming = decoder.submit(decode, batches[0]) if batches else None
            for following in [*batches[1:], None]:
                pixels = coming.result() if coming else {}
                coming = decoder.submit(decode, following) if following else None
                readable = {key: each for key, each in pixels.items() if isinstance(each, Tensor)}
                if readable:
                    yield from zip(readable, _encode(self.encoder, list(readable.values())), strict=True)
                yield from ((key, each) for key, each in pixels.items() if isinstance(each, RefusedError))

    def _readable(
        self, images: dict[str, ImageLike], batch_size: int, skip_unreadable: bool
    ) -> Iterator[tuple[str, Tensor]]:
        for key, features in self._encode_each(images, batch_size):
            if isinstance(features, Tensor):
                yield key, features
            elif not skip_unreadable:
                raise features

    def _pixels(self, image: ImageLike) -> Tensor:
        return self.encoder.transform(self.decode(image, self.encoder.image_config))

    def _keep(self, encoded: dict[str, Tensor]) -> None:
        self._kept |= encoded
        self._kept_bytes += sum(features.nbytes for features in encoded.values())
        while self._kept_bytes > KEPT_BYTES:
            self._kept_bytes -= self._kept.popitem(last=False)[1].nbytes

    def _on_disk(self, key: str) -> Tensor | None:
        return None if self.store is None else self.store.get(key)

    @property
    def _image_bytes(self) -> int:
        return self.encoder.num_tokens * self.encoder.dim * self.encoder.feature_dtype.itemsize

    def _fits(self, missing: int) -> bool:
        """Says how large what is to come will be, or that it is not written."""
        root = self.directory.parent
        wanted, (allowed, rule) = missing * self._image_bytes, room(root, self.max_gb)
        size = (
            f"{missing:,} images x {self._image_bytes:,} bytes ({self.encoder.num_tokens:,} tokens x "
            f"{self.encoder.dim:,} in {dtype_name(self.encoder)}) are {wanted / 1e9:,.3f} GB"
        )
        limit = f"{allowed / 1e9:,.3f} GB may be ({rule})"
        if wanted > allowed:
            tell(f"not written: {size}, and {limit}. {IN_THE_STEP}")
            return False
        tell(f"{size}, to write into {self.directory}; {limit}")
        if (earlier := root / _name(self.encoder.fingerprint) / EARLIER).exists():
            tell(
                f"features of an earlier version in {earlier.parent} are not read, but encoded again; "
                "`mmpeft cache clear` deletes them"
            )
        return True


def _counted(
    features: Iterable[tuple[str, Tensor]], update: Callable[[int], object]
) -> Iterator[tuple[str, Tensor]]:
    for each in features:
        update(1)
        yield each


def _name(fingerprint: dict[str, Any]) -> str:
    """Of an encoder's folder."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:16]


def encode_images(encoder: Encoder, images: Sequence[ImageLike], batch_size: int = 64) -> Tensor:
    """(images, image tokens, vision dim) in the encoder's `feature_dtype`, now; an image that comes twice once.

    Raises:
        RefusedError: an image cannot be read, or a feature is too large for it or not a number.
    """
    config = encoder.image_config
    keys = [image_key(image, config) for image in images]
    different = list(dict(zip(keys, images, strict=True)).values())
    parts = []
    for start in range(0, len(different), batch_size):
        chunk = different[start : start + batch_size]
        for own in _encode(encoder, [encoder.transform(load_image(image, config)) for image in chunk]):
            if isinstance(own, RefusedError):
                raise own
            parts.append(own)
    places = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    return torch.stack([parts[places[key]] for key in keys])


@torch.no_grad()
def _encode(encoder: Encoder, pixels: Sequence[Tensor]) -> list[Tensor | RefusedError]:
    """The features of every image from its pixels, or why they cannot be kept."""
    features = encoder(torch.stack(list(pixels))).to("cpu", encoder.feature_dtype)
    finite = torch.isfinite(features).flatten(1).all(1).tolist()
    refusal = RefusedError(
        f"the vision encoder gave features that are NaN or beyond {dtype_name(encoder)}'s "
        f"{torch.finfo(encoder.feature_dtype).max:.5g}; choose a layer with its norm, or set "
        "model.vision.feature_dtype to bfloat16"
    )
    return [own if fits else refusal for own, fits in zip(features, finite, strict=True)]


def dtype_name(encoder: Encoder) -> str:
    """As in the settings."""
    return str(encoder.feature_dtype).removeprefix("torch.")


def _or_refused(action: Callable[[ImageLike], Item], image: ImageLike) -> Item | RefusedError:
    try:
        return action(image)
    except RefusedError as error:
        return error

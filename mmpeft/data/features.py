"""Features of images under a frozen encoder, which sees each image once: from disk, from memory, or encoded now.

On disk they are kept per encoder in ``<directory>/<encoder>/`` (`feature_cache.encoder_folder`). An entry's key is
(encoder weights, layer, pooling, transform; bytes of the image), so a changed image or encoder misses the cache
instead of hitting a wrong entry. Shards are written whole under a lock: a killed build goes on where it stopped, two
builds do not clash.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from threading import RLock
from typing import Any

from torch import Tensor

from mmpeft.data.encoder import Encoder, stacked
from mmpeft.data.encoding import NOTHING_DECODED, ImageEncoding, or_refused
from mmpeft.data.feature_cache.encoder_folder import EARLIER, tell
from mmpeft.data.feature_cache.footprint import Footprint
from mmpeft.data.feature_cache.image_keys import ImageKeys
from mmpeft.data.feature_cache.room import alone, room
from mmpeft.data.feature_cache.shard_file import rows_per_shard
from mmpeft.data.feature_cache.store import FeatureStore
from mmpeft.data.images import ImageLike
from mmpeft.data.unusable_image import UnusableImageError
from mmpeft.errors import RefusedError
from mmpeft.progress_bar import progress_bar

LAYOUT = 2
"""Of the files. Another layout has other folders, so that none is misread."""
SHARD_IMAGES = 4096
KEPT_BYTES = 2**28
"""Features in memory of images that are not on disk: 145,000 of the embedded encoder, 220 of 576 tokens of 1,024."""
DECODED_TOGETHER = 64
"""Images whose pixels are held while it is looked which can be decoded."""
DOING = "encoding images"
IN_THE_STEP = "Images are encoded in the step that needs them, again in each epoch"


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
        self.encoding = ImageEncoding(encoder)
        root = None if directory is None else Path(directory)
        self.key = ImageKeys(root, encoder.image_config)
        """An image's identity by its content; a file is read once, and again when it has changed."""
        self._footprint = Footprint(encoder)
        self.image_tokens = self._footprint.image_tokens
        """Of every image, or what tells them of one."""
        name, shape = _name({"layout": LAYOUT, **encoder.fingerprint}), (encoder.num_tokens, encoder.dim)
        self.store = None if root is None else FeatureStore(root / name, encoder.fingerprint, shape)
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self._kept_bytes = 0
        # batches are made in threads of their own: of those that ask one encodes, while others look and decode
        self._encoding, self._lock = RLock(), RLock()

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
            UnusableImageError: an image cannot be read.
            RefusedError: the disk is full.
        """
        wanted: dict[str, ImageLike] = {}
        for image in images:
            key = or_refused(self.key, image)
            if isinstance(key, str):
                wanted[key] = image
            elif not skip_unreadable:
                raise UnusableImageError(image, str(key)) from key
        self.key.flush()
        missing = [image for key, image in wanted.items() if self._on_disk(key) is None]
        if self.store is None or not missing or not self._fits(missing):
            return 0
        with self._lock, self.store.writing(wanted) as left:
            # another process may have written meanwhile, of these images or of others
            if not left or not self._fits([wanted[key] for key in left], self.store):
                return 0
            encoded, size = 0, min(SHARD_IMAGES, rows_per_shard(self._footprint.most))
            with progress_bar(DOING, "image", len(left)) as update:
                for start in range(0, len(left), size):
                    part = {key: wanted[key] for key in left[start : start + size]}
                    features = self._readable(part, batch_size, skip_unreadable)
                    encoded += self.store.add(list(part), _counted(features, update))
        return encoded

    def __call__(self, images: Sequence[ImageLike]) -> Tensor | list[Tensor]:
        """(images, image tokens, vision dim) in the encoder's `feature_dtype`; (image tokens, vision dim) of each where
        their number differs.

        Raises:
            UnusableImageError: one of them cannot be read.
        """
        return _all_or_refused(images, self.load(images))

    def begin(self, images: Sequence[ImageLike]) -> Callable[[], Tensor | list[Tensor]]:
        """Decodes, in this thread, those images that will have to be encoded. What it gives encodes them and returns
        what a call would."""
        keys = {key: image for image in images if isinstance(key := or_refused(self.key, image), str)}
        pixels = {
            key: or_refused(self.encoding.pixels, image) for key, image in keys.items() if not self._has(key)
        }
        return lambda: _all_or_refused(images, self.load(images, pixels))

    def holds(self, image: ImageLike) -> bool:
        """Whether an image's features are at hand, so that it need not be decoded.

        Raises:
            ImageError: it cannot be named, see `key`.
        """
        return self._has(self.key(image))

    def bytes_to_come(self, images: int) -> int:
        """How much memory features will take beside those that are held in it, at most: of images on disk as pages of
        their files, which the system can take back.

        Args:
            images: different ones that will be asked for.
        """
        most = images * self._footprint.most
        return most if self.store is not None else max(0, min(most, KEPT_BYTES) - self._kept_bytes)

    def load(
        self, images: Sequence[ImageLike], pixels: Mapping[str, Any] = NOTHING_DECODED
    ) -> list[Tensor | RefusedError]:
        """The features (image tokens, vision dim) of every image, or why it has none; one does not harm another.

        Args:
            images: of any number of duplicates.
            pixels: key -> what an image was decoded to, or why it was not, of those that were decoded already.
        """
        with self._encoding:
            return self._load(images, pixels)

    def _load(self, images: Sequence[ImageLike], pixels: Mapping[str, Any]) -> list[Tensor | RefusedError]:
        keys = [or_refused(self.key, image) for image in images]
        by_key = {key: image for key, image in zip(keys, images, strict=True) if isinstance(key, str)}
        store = self.store
        with self._lock:
            if store and (damaged := {key: image for key, image in by_key.items() if store.is_lost(key)}):
                self.build(damaged.values(), skip_unreadable=True)
                store.give_up(damaged)  # those that did not fit are encoded as others are
        found: dict[str, Tensor | RefusedError] = {}
        for key in by_key:
            if (own := self._on_disk(key)) is not None or (own := self._kept.get(key)) is not None:
                found[key] = own
        missing = {key: image for key, image in by_key.items() if key not in found}
        encoded = dict(self.encoding.each(missing, pixels))
        self._keep({key: own for key, own in encoded.items() if isinstance(own, Tensor)})
        found |= encoded
        return [key if isinstance(key, RefusedError) else found[key] for key in keys]

    def undecodable(self, images: Iterable[ImageLike]) -> dict[str | bytes, str]:
        """What is wrong with those images that cannot be read; all without features on disk are decoded."""
        seen: set[int] = set()
        faults: dict[str | bytes, str] = {}

        def waiting() -> Iterator[Any]:
            for image in images:
                if hash(image) not in seen:  # hashes, as a million paths as text are large
                    seen.add(hash(image))
                    key = or_refused(self.key, image)
                    if isinstance(key, RefusedError) or self._on_disk(key) is None:
                        yield image

        with ThreadPoolExecutor() as decoders:
            every = waiting()
            while some := list(islice(every, DECODED_TOGETHER)):
                for image, found in zip(
                    some, decoders.map(partial(or_refused, self.encoding.pixels), some), strict=True
                ):
                    if isinstance(found, RefusedError):
                        faults[image] = str(found)
        self.key.flush()
        return faults

    def _readable(
        self, images: dict[str, ImageLike], batch_size: int, skip_unreadable: bool
    ) -> Iterator[tuple[str, Tensor]]:
        for key, features in self.encoding.each(images, batch_size=batch_size):
            if isinstance(features, Tensor):
                yield key, features
            elif not skip_unreadable:
                raise UnusableImageError(images[key], str(features)) from features

    def _keep(self, encoded: dict[str, Tensor]) -> None:
        self._kept |= encoded
        self._kept_bytes += sum(features.nbytes for features in encoded.values())
        while self._kept_bytes > KEPT_BYTES:
            self._kept_bytes -= self._kept.popitem(last=False)[1].nbytes

    def _on_disk(self, key: str) -> Tensor | None:
        with self._lock:
            return None if self.store is None else self.store.get(key)

    def _has(self, key: str) -> bool:
        return self._on_disk(key) is not None or key in self._kept

    def _fits(self, missing: Sequence[ImageLike], store: FeatureStore | None = None) -> bool:
        """Whether there is room for what is to come; that there is none is said.

        Args:
            store: promises it to whoever else looks for room, and it is said how much it is; None only looks.
        """
        root = self.directory.parent
        wanted, told = self._footprint.of(missing)
        with nullcontext() if store is None else alone(root):
            allowed, rule = room(root, self.max_gb)
            if store is not None and wanted <= allowed:
                store.promise(wanted)
        size, limit = f"{told} are {wanted / 1e9:,.3f} GB", f"{allowed / 1e9:,.3f} GB may be ({rule})"
        if wanted > allowed:
            tell(f"not written: {size}, and {limit}. {IN_THE_STEP}")
        elif store is not None:
            tell(f"{size}, to write into {self.directory}; {limit}; images of the same content are one")
            if (earlier := root / _name(self.encoder.fingerprint) / EARLIER).exists():
                tell(
                    f"features of an earlier version in {earlier.parent} are not read, but encoded again; "
                    "`mmpeft cache clear` deletes them"
                )
        return wanted <= allowed


def _counted(
    features: Iterable[tuple[str, Tensor]], update: Callable[[int], object]
) -> Iterator[tuple[str, Tensor]]:
    for each in features:
        update(1)
        yield each


def _name(fingerprint: dict[str, Any]) -> str:
    """Of an encoder's folder."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:16]


def _all_or_refused(
    images: Sequence[ImageLike], loaded: Sequence[Tensor | RefusedError]
) -> Tensor | list[Tensor]:
    for image, features in zip(images, loaded, strict=True):
        if isinstance(features, RefusedError):
            raise UnusableImageError(image, str(features)) from features
    return stacked(loaded)  # pyright: ignore[reportArgumentType]

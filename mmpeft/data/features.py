"""The cache of frozen-vision features: a frozen encoder sees each image once.

Features are kept per encoder in ``<directory>/<encoder>/``: shards of safetensors and an index from the image's
hash to its place. An entry's key is (encoder weights, layer, pooling, transform; bytes of the image), so a
changed image or encoder misses the cache instead of hitting a wrong entry. Shards are written whole
(temporary file, then rename) under a lock: a killed build goes on where it stopped, two builds do not clash.
"""

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from filelock import FileLock
from safetensors.torch import load_file
from torch import Tensor

from mmpeft.data.images import ImageLike, image_key, load_image
from mmpeft.errors import RefusedError
from mmpeft.files import save_tensors, write_whole
from mmpeft.progress_bar import progress_bar

FEATURE_DTYPE = torch.float16
"""What features are, cached or not: rounding both the same way makes cached equal uncached."""
SHARD_IMAGES = 4096
KEPT_BYTES = 2**28
"""Features in memory of images that are not on disk: 145,000 of the embedded encoder, 220 of 576 tokens of 1,024."""
Item = TypeVar("Item")


class Encoder(Protocol):
    """What the cache needs of a vision encoder."""

    fingerprint: dict[str, Any]

    def transform(self, image: Any) -> Tensor: ...

    def __call__(self, pixels: Tensor) -> Tensor: ...


class FeatureCache:
    """Features of images under one encoder: once per content, from disk, from memory, or encoded now.

    `build` keeps them on disk for good. Any other image is encoded when it is asked for and kept in memory, the
    latest `KEPT_BYTES` of them, so that a million images to be captioned fill no disk.

    Raises:
        RefusedError: the folder belongs to another encoder, layer, pooling or transform; the message names the
            fields that differ.
    """

    def __init__(self, directory: str | Path, encoder: Encoder):
        self.encoder = encoder
        name = hashlib.sha256(json.dumps(encoder.fingerprint, sort_keys=True).encode()).hexdigest()[:16]
        self.directory = Path(directory) / name
        self._places: dict[str, tuple[str, int]] = {}
        self._checksums: dict[str, str] = {}
        self._shards: dict[str, Tensor] = {}
        self._keys: dict[tuple[str, int, int], str] = {}
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self._kept_bytes = 0
        self._lost: set[str] = set()
        self._open()

    def build(self, images: Iterable[ImageLike], batch_size: int = 64, skip_unreadable: bool = False) -> int:
        """Encodes what is not on disk yet, for good.

        Args:
            images: of any number of duplicates.
            batch_size: images that the encoder gets together.
            skip_unreadable: leave those out that cannot be read, for whoever asks for them.

        Returns:
            The number of images encoded.

        Raises:
            RefusedError: an image cannot be read.
        """
        wanted: dict[str, ImageLike] = {}
        for image in images:
            key = _or_refused(self.key, image)
            if isinstance(key, str):
                wanted[key] = image
            elif not skip_unreadable:
                raise key
        if all(self._on_disk(key) is not None for key in wanted):
            return 0
        self.directory.mkdir(parents=True, exist_ok=True)
        encoded = 0
        with FileLock(self.directory / "lock"):
            self._open()  # another process may have built them while this one waited
            missing = [key for key in wanted if self._on_disk(key) is None]
            with progress_bar("encoding images", "image", len(missing)) as update:
                for start in range(0, len(missing), SHARD_IMAGES):
                    part = {key: wanted[key] for key in missing[start : start + SHARD_IMAGES]}
                    shard: dict[str, Tensor] = {}
                    for key, features in self._encode_each(part, batch_size):
                        update(1)
                        if isinstance(features, Tensor):
                            shard[key] = features
                        elif not skip_unreadable:
                            raise features
                    self._write(shard)
                    encoded += len(shard)
        return encoded

    def __call__(self, images: Sequence[ImageLike]) -> Tensor:
        """(images, image tokens, vision dim) in `FEATURE_DTYPE`.

        Raises:
            RefusedError: one of them cannot be read.
        """
        loaded = self.load(images)
        for features in loaded:
            if isinstance(features, RefusedError):
                raise features
        return torch.stack(loaded)  # pyright: ignore[reportArgumentType]

    def load(self, images: Sequence[ImageLike]) -> list[Tensor | RefusedError]:
        """The features (image tokens, vision dim) of every image, or why it has none; one does not harm another."""
        keys = [_or_refused(self.key, image) for image in images]
        by_key = {key: image for key, image in zip(keys, images, strict=True) if isinstance(key, str)}
        if damaged := [
            image for key, image in by_key.items() if self._on_disk(key) is None and key in self._lost
        ]:
            self.build(damaged, skip_unreadable=True)
        found: dict[str, Tensor | RefusedError] = {}
        for key in by_key:
            if (own := self._on_disk(key)) is not None or (own := self._kept.get(key)) is not None:
                found[key] = own
        missing = {key: image for key, image in by_key.items() if key not in found}
        encoded = dict(self._encode_each(missing))
        self._keep({key: own for key, own in encoded.items() if isinstance(own, Tensor)})
        found |= encoded
        return [key if isinstance(key, RefusedError) else found[key] for key in keys]

    def key(self, image: ImageLike) -> str:
        """An image's identity by its content; a file is read once, and again when it has changed."""
        if not isinstance(image, str):
            return image_key(image)
        try:
            state = os.stat(image)
        except (OSError, ValueError):
            return image_key(image)  # which says what is wrong
        version = image, state.st_mtime_ns, state.st_size
        if version not in self._keys:
            self._keys[version] = image_key(image)
        return self._keys[version]

    def _encode_each(
        self, images: dict[str, ImageLike], batch_size: int = 64
    ) -> Iterator[tuple[str, Tensor | RefusedError]]:
        """Key -> features, or why the image cannot be read."""
        keys = list(images)
        for start in range(0, len(keys), batch_size):
            pixels = {key: _or_refused(self._pixels, images[key]) for key in keys[start : start + batch_size]}
            readable = {key: each for key, each in pixels.items() if isinstance(each, Tensor)}
            if readable:
                yield from zip(readable, _encode(self.encoder, list(readable.values())), strict=True)
            yield from ((key, each) for key, each in pixels.items() if isinstance(each, RefusedError))

    def _pixels(self, image: ImageLike) -> Tensor:
        return self.encoder.transform(load_image(image))

    def _keep(self, encoded: dict[str, Tensor]) -> None:
        self._kept |= encoded
        self._kept_bytes += sum(features.nbytes for features in encoded.values())
        while self._kept_bytes > KEPT_BYTES:
            self._kept_bytes -= self._kept.popitem(last=False)[1].nbytes

    def _open(self) -> None:
        self._places, self._checksums = {}, {}
        content = self._index()
        if content is None:
            return
        differ = [k for k, v in self.encoder.fingerprint.items() if content["encoder"].get(k) != v]
        if differ:
            raise RefusedError(
                f"{self.directory} holds features of another encoder: "
                + "; ".join(
                    f"{k} is {content['encoder'].get(k)!r}, wanted {self.encoder.fingerprint[k]!r}"
                    for k in differ
                )
                + ". Delete that folder, or choose another cache folder"
            )
        for shard in content["shards"]:
            self._add(shard)

    def _index(self) -> dict[str, Any] | None:
        """The content of index.json; None where there is none that can be read."""
        index = self.directory / "index.json"
        try:
            return json.loads(index.read_text()) if index.exists() else None
        except ValueError:
            print(f"feature cache: {index} is damaged; its images are encoded again")
            return None

    def _add(self, shard: dict[str, Any]) -> None:
        self._checksums[shard["file"]] = shard["sha256"]
        self._places |= {key: (shard["file"], row) for row, key in enumerate(shard["keys"])}

    def _on_disk(self, key: str) -> Tensor | None:
        """The features of an image from its shard, which is checked when it is first needed."""
        if key not in self._places:
            return None
        name, row = self._places[key]
        if name not in self._shards:
            path = self.directory / name
            if not path.exists() or _checksum(path) != self._checksums[name]:
                lost = {other for other, (file, _) in self._places.items() if file == name}
                if not lost <= self._lost:
                    print(
                        f"feature cache: {path} is missing or damaged; its {len(lost)} images are encoded again"
                    )
                self._lost |= lost
                for other in lost:
                    del self._places[other]
                return None
            self._shards[name] = load_file(path)["features"]
        return self._shards[name][row]

    def _write(self, shard_features: dict[str, Tensor]) -> None:
        """Adds a shard."""
        if not shard_features:
            return
        keys = list(shard_features)
        content = self._index() or {"shards": []}
        intact = [s for s in content["shards"] if set(s["keys"]) <= self._places.keys()]
        name = f"{hashlib.sha256(''.join(keys).encode()).hexdigest()[:16]}.safetensors"
        save_tensors({"features": torch.stack(list(shard_features.values()))}, self.directory / name)
        shard = {"file": name, "sha256": _checksum(self.directory / name), "keys": keys}
        content = {"encoder": self.encoder.fingerprint, "shards": [*intact, shard]}
        write_whole(self.directory / "index.json", json.dumps(content))
        self._shards.pop(name, None)
        self._lost -= set(keys)
        self._add(shard)


def encode_images(encoder: Encoder, images: Sequence[ImageLike], batch_size: int = 64) -> Tensor:
    """(images, image tokens, vision dim) in `FEATURE_DTYPE`, computed now; an image that comes twice once.

    Raises:
        RefusedError: an image cannot be read, or a feature is too large for `FEATURE_DTYPE` or not a number.
    """
    keys = [image_key(image) for image in images]
    different = list(dict(zip(keys, images, strict=True)).values())
    parts = []
    for start in range(0, len(different), batch_size):
        chunk = different[start : start + batch_size]
        for own in _encode(encoder, [encoder.transform(load_image(image)) for image in chunk]):
            if isinstance(own, RefusedError):
                raise own
            parts.append(own)
    places = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    return torch.stack([parts[places[key]] for key in keys])


@torch.no_grad()
def _encode(encoder: Encoder, pixels: Sequence[Tensor]) -> list[Tensor | RefusedError]:
    """The features of every image from its pixels, or why they cannot be kept."""
    features = encoder(torch.stack(list(pixels))).to("cpu", FEATURE_DTYPE)
    finite = torch.isfinite(features).flatten(1).all(1).tolist()
    refusal = RefusedError(
        "the vision encoder gave features that are NaN or beyond float16's 65504; choose a layer with its norm"
    )
    return [own if fits else refusal for own, fits in zip(features, finite, strict=True)]


def _or_refused(action: Callable[[ImageLike], Item], image: ImageLike) -> Item | RefusedError:
    try:
        return action(image)
    except RefusedError as error:
        return error


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

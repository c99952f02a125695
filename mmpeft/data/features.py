"""The cache of frozen-vision features: a frozen encoder sees each image once.

Features are kept per encoder in ``<directory>/<encoder>/``: shards of safetensors and an index from the image's
hash to its place. An entry's key is (encoder weights, layer, pooling, transform; bytes of the image), so a
changed image or encoder misses the cache instead of hitting a wrong entry. Shards are written whole
(temporary file, then rename) under a lock: a killed build goes on where it stopped, two builds do not clash.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from mmpeft.data.images import ImageLike, image_key, load_image
from mmpeft.errors import RefusedError

FEATURE_DTYPE = torch.float16
"""What features are, cached or not: rounding both the same way makes cached equal uncached."""
SHARD_IMAGES = 4096


class Encoder(Protocol):
    """What the cache needs of a vision encoder."""

    fingerprint: dict[str, Any]

    def transform(self, image: Any) -> Tensor: ...

    def __call__(self, pixels: Tensor) -> Tensor: ...


class FeatureCache:
    """Features of images under one encoder, on disk and mapped into memory.

    Raises:
        RefusedError: the folder belongs to another encoder, layer, pooling or transform; the message names the
            fields that differ.
    """

    def __init__(self, directory: str | Path, encoder: Encoder):
        self.encoder = encoder
        name = hashlib.sha256(json.dumps(encoder.fingerprint, sort_keys=True).encode()).hexdigest()[:16]
        self.directory = Path(directory) / name
        self._places: dict[str, tuple[int, int]] = {}
        self._shards: list[Tensor] = []
        self._keys: dict[str, str] = {}
        self._open()

    def build(self, images: Iterable[ImageLike], batch_size: int = 64) -> int:
        """Encodes what is not there yet. Returns the number of images encoded."""
        wanted = {self.key(image): image for image in images}
        if all(key in self._places for key in wanted):
            return 0
        self.directory.mkdir(parents=True, exist_ok=True)
        with FileLock(self.directory / "lock"):
            self._open()  # another process may have built them while this one waited
            missing = {key: image for key, image in wanted.items() if key not in self._places}
            with tqdm(total=len(missing), desc="encoding images", unit="image") as bar:
                for start in range(0, len(missing), SHARD_IMAGES):
                    part = dict(list(missing.items())[start : start + SHARD_IMAGES])
                    self._write(list(part), encode_images(self.encoder, list(part.values()), batch_size, bar))
            self._open()
        return len(missing)

    def __call__(self, images: Sequence[ImageLike]) -> Tensor:
        """(images, image tokens, vision dim) in `FEATURE_DTYPE`; images that were never built are encoded now."""
        keys = [self.key(image) for image in images]
        if any(key not in self._places for key in keys):
            self.build(images)
        places = [self._places[key] for key in keys]
        return torch.stack([self._shards[shard][row] for shard, row in places])

    def key(self, image: ImageLike) -> str:
        """An image's identity by its content; a file is read once."""
        if not isinstance(image, str):
            return image_key(image)
        if image not in self._keys:
            self._keys[image] = image_key(image)
        return self._keys[image]

    def _open(self) -> None:
        self._places, self._shards = {}, []
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
            self._open_shard(shard)

    def _index(self) -> dict[str, Any] | None:
        """The content of index.json; None where there is none that can be read."""
        index = self.directory / "index.json"
        try:
            return json.loads(index.read_text()) if index.exists() else None
        except ValueError:
            print(f"feature cache: {index} is damaged; its images are encoded again")
            return None

    def _open_shard(self, shard: dict[str, Any]) -> None:
        path = self.directory / shard["file"]
        if not path.exists() or _checksum(path) != shard["sha256"]:
            print(
                f"feature cache: {path} is missing or damaged; its {len(shard['keys'])} images are encoded again"
            )
            return
        self._places |= {key: (len(self._shards), row) for row, key in enumerate(shard["keys"])}
        self._shards.append(load_file(path)["features"])

    def _write(self, keys: list[str], features: Tensor) -> None:
        content = self._index() or {"shards": []}
        intact = [s for s in content["shards"] if set(s["keys"]) <= self._places.keys()]
        name = f"{hashlib.sha256(''.join(keys).encode()).hexdigest()[:16]}.safetensors"
        save_file({"features": features}, self.directory / f"{name}.part")
        os.replace(self.directory / f"{name}.part", self.directory / name)
        shard = {"file": name, "sha256": _checksum(self.directory / name), "keys": keys}
        content = {"encoder": self.encoder.fingerprint, "shards": [*intact, shard]}
        (self.directory / "index.part").write_text(json.dumps(content))
        os.replace(self.directory / "index.part", self.directory / "index.json")
        self._open_shard(shard)


@torch.no_grad()
def encode_images(
    encoder: Encoder, images: Sequence[ImageLike], batch_size: int = 64, bar: Any = None
) -> Tensor:
    """(images, image tokens, vision dim) in `FEATURE_DTYPE`, computed now.

    Raises:
        RefusedError: a feature is too large for `FEATURE_DTYPE`, or not a number.
    """
    parts = []
    for start in range(0, len(images), batch_size):
        chunk = images[start : start + batch_size]
        pixels = torch.stack([encoder.transform(load_image(image)) for image in chunk])
        parts.append(encoder(pixels).to("cpu", FEATURE_DTYPE))
        if not torch.isfinite(parts[-1]).all():
            raise RefusedError(
                "the vision encoder gave features that are NaN or beyond float16's 65504; choose a layer with its norm"
            )
        if bar is not None:
            bar.update(len(chunk))
    return torch.cat(parts)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""One encoder's features on disk: read by memory map, added in shards, those of damaged shards known as lost."""

import hashlib
import struct
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

from torch import Tensor

from mmpeft.data.feature_cache.encoder_folder import SHARD, EncoderFolder, Shard, tell
from mmpeft.data.feature_cache.shard_file import map_shard, write_shard
from mmpeft.errors import RefusedError

NO_SHARD = (KeyError, RuntimeError, StopIteration, TypeError, ValueError, struct.error)
"""What reading a damaged header raises."""


class Ragged:
    """Images of different numbers of tokens, one after the other.

    Args:
        features: (tokens of all images, dim).
        tokens: of each image.
    """

    def __init__(self, features: Tensor, tokens: Sequence[int]):
        self.features, self.ends = features, [0, *accumulate(tokens)]

    def __getitem__(self, number: int) -> Tensor:
        """(tokens, dim) of an image."""
        return self.features[self.ends[number] : self.ends[number + 1]]


class FeatureStore:
    """Key of an image (64 hex digits) -> its features.

    Args:
        directory: of this encoder.
        fingerprint: of this encoder.
        shape: (tokens, dim) of an image's features; None tokens where their number depends on its shape.

    Raises:
        RefusedError: the folder belongs to another encoder, layer, pooling or transform; the message names the
            fields that differ.
    """

    def __init__(self, directory: Path, fingerprint: dict[str, Any], shape: tuple[int | None, int]):
        self.directory, self.fingerprint, self.shape = directory, fingerprint, shape
        self._folder = EncoderFolder(directory)
        self._lost: set[bytes] = set()
        self._check_encoder()
        self._forget()

    def get(self, key: str) -> Tensor | None:
        """The features of an image where they lie in their shard, whose time is checked when it is first needed."""
        shards, digest = self._look(), bytes.fromhex(key)
        if (place := self._places.get(digest)) is None:
            return None
        number = bisect_right(self._starts, place) - 1
        if number not in self._maps:
            shard = shards[number]
            if (features := self._map(shard)) is None:
                self._lose(shard, "its bytes are not those that were written")
                return None
            self._maps[number] = features
        return self._maps[number][place - self._starts[number]]

    def is_lost(self, key: str) -> bool:
        """Whether it was there, in a shard that is damaged."""
        return self.get(key) is None and bytes.fromhex(key) in self._lost

    def give_up(self, keys: Iterable[str]) -> None:
        """These are not looked for any more."""
        self._lost -= {bytes.fromhex(key) for key in keys}

    @contextmanager
    def writing(self, keys: Iterable[str]) -> Iterator[list[str]]:
        """Inside, no other process adds features here, and what is damaged is gone. Gives those of the keys that have
        none: another process may have added them while this one waited."""
        self._folder.begin(self.fingerprint)
        with self._folder.locked():
            self._forget()
            missing = [key for key in keys if self.get(key) is None]
            for shard in self._damaged:
                shard.delete()
            self._folder.tidy()
            try:
                yield missing
            finally:
                self._folder.withdraw()

    def promise(self, num_bytes: int) -> None:
        """Says to all that look for room, while `writing`, that so many bytes will be added."""
        self._folder.promise(num_bytes)

    def add(self, wanted: Sequence[str], features: Iterable[tuple[str, Tensor]]) -> int:
        """Writes a shard, while `writing`.

        Args:
            wanted: keys of the images that it is for; some of them may turn out to have no features.
            features: key -> features, as they are made.

        Returns:
            How many there were.

        Raises:
            RefusedError: there is no room on the disk.
        """
        keys: list[bytes] = []
        tokens: list[int] = []

        def rows() -> Iterator[Tensor]:
            for key, own in features:
                keys.append(bytes.fromhex(key))
                tokens.append(len(own))
                yield own

        name = hashlib.sha256("".join(wanted).encode()).hexdigest()[:16]
        number = write_shard(self.directory / f"{name}{SHARD}", rows(), len(wanted))
        if number:
            self._take(self._look(), self._folder.add(name, keys, tokens))
            self._lost -= set(keys)
        return number

    def _check_encoder(self) -> None:
        if (theirs := self._folder.encoder()) is None:
            return
        own = self.fingerprint
        if differ := [field for field, value in own.items() if theirs.get(field) != value]:
            fields = "; ".join(f"{field} is {theirs.get(field)!r}, wanted {own[field]!r}" for field in differ)
            raise RefusedError(
                f"{self.directory} holds features of another encoder: {fields}. Delete that folder, or choose "
                "another cache folder"
            )

    def _forget(self) -> None:
        """The disk is looked at when it is next needed."""
        self._shards: list[Shard] | None = None
        self._damaged: list[Shard] = []
        self._places: dict[bytes, int] = {}
        """Key -> row, counted over all shards."""
        self._starts: list[int] = []
        """First row of each shard."""
        self._maps: dict[int, Tensor | Ragged] = {}
        """Shard -> (tokens, dim) of each of its images."""

    def _look(self) -> list[Shard]:
        if self._shards is None:
            self._shards = []
            for shard in self._folder.shards():
                if fault := shard.fault():
                    self._lose(shard, fault)
                else:
                    self._take(self._shards, shard)
        return self._shards

    def _take(self, shards: list[Shard], shard: Shard) -> None:
        first = self._starts[-1] + len(shards[-1]) if shards else 0
        shards.append(shard)
        self._starts.append(first)
        self._places.update(zip(shard, range(first, first + len(shard)), strict=True))

    def _map(self, shard: Shard) -> "Tensor | Ragged | None":
        if not shard.unchanged():
            return None
        try:
            features = map_shard(shard.path)
        except NO_SHARD:
            return None
        tokens, dim = self.shape
        if shard.tokens is not None:
            fits = tokens is None and features.shape == (sum(shard.tokens), dim)
            return Ragged(features, shard.tokens) if fits else None
        tokens = features.shape[1] if tokens is None else tokens
        return features if features.shape == (len(shard), tokens, dim) else None

    def _lose(self, shard: Shard, fault: str) -> None:
        lost = set(shard)
        if not lost <= self._lost:
            tell(f"{shard.path} is damaged: {fault}; its {len(lost)} images are encoded again")
        self._lost |= lost
        self._damaged.append(shard)
        for key in lost:
            self._places.pop(key, None)

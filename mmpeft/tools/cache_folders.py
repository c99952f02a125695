"""What the feature cache holds: listed, read byte by byte, deleted. No torch is needed for it."""

from pathlib import Path

from mmpeft.data.feature_cache.encoder_folder import (
    EncoderFolder,
    earlier_folders,
    encoder_folders,
)
from mmpeft.data.feature_cache.room import ONE_AT_A_TIME, size_of
from mmpeft.data.feature_cache.settings import KEYS, CacheConfig
from mmpeft.errors import RefusedError
from mmpeft.hashing import hash_file


def list_cache(folder: str | None, encoder: str | None) -> None:
    """Prints a line per encoder, the largest first."""
    cache = _cache(folder)
    found = sorted(_chosen(cache, encoder), key=size_of, reverse=True)
    for path in found:
        print(f"{path.name:<18} {size_of(path) / 1e9:>9.3f} GB  {_told(path)}")
    print(f"{cache}: {sum(map(size_of, found)) / 1e9:,.3f} GB of features of {len(found)} encoders")


def verify_cache(folder: str | None, encoder: str | None) -> int:
    """Reads every shard; those that are not as they were written are deleted, so that no fit reads them.

    Returns:
        How many shards were damaged.
    """
    cache, damaged, read = _cache(folder), 0, 0
    for path in _chosen(cache, encoder):
        own = EncoderFolder(path)
        if own.encoder() is None:
            print(f"{path.name}: of an earlier version, which nobody reads; `mmpeft cache clear` deletes it")
            continue
        with own.locked():
            for shard in own.shards():
                fault = shard.fault()
                if not fault and hash_file(shard.path) != shard.sha256:
                    fault = "its bytes are not those that were written"
                read += 1
                if fault:
                    damaged += 1
                    print(
                        f"{shard.path} is damaged: {fault}; deleted, its {len(shard)} images are encoded again"
                    )
                    shard.delete()
            own.tidy()
    print(f"{cache}: {read - damaged} shards are whole, {damaged} were damaged")
    return damaged


def clear_cache(folder: str | None, encoder: str | None) -> None:
    """Deletes features, but not while a process writes them; of all encoders also what is known of image files."""
    cache, freed = _cache(folder), 0
    for path in _chosen(cache, encoder):
        size = size_of(path)
        with EncoderFolder(path).locked():
            EncoderFolder(path).clear()
        freed += size
    if encoder is None:
        for path in (*cache.glob(f"{KEYS}*"), cache / ONE_AT_A_TIME):
            path.unlink(missing_ok=True)
    print(f"{cache}: {freed / 1e9:,.3f} GB deleted")


def _cache(folder: str | None) -> Path:
    cache = CacheConfig(folder=folder).path
    if folder is not None and not cache.is_dir():
        raise RefusedError(f"--folder: there is no folder {folder}; name the one that data.cache names")
    return cache


def _chosen(cache: Path, encoder: str | None) -> list[Path]:
    every = [*(own.directory for own in encoder_folders(cache)), *earlier_folders(cache)]
    if encoder is None:
        return every
    found = [path for path in every if path.name.startswith(encoder)]
    if len(found) != 1:
        names = ", ".join(path.name for path in found or every) or "none"
        raise RefusedError(f"--encoder {encoder}: {len(found)} folders begin so; wanted one of {names}")
    return found


def _told(path: Path) -> str:
    own = EncoderFolder(path)
    if (encoder := own.encoder()) is None:
        return "of an earlier version, which nobody reads; clear deletes it"
    images = sum(map(len, own.shards()))
    pooling = "" if (how := encoder.get("pooling", ["none"]))[0] == "none" else f" {how[0]} {how[1]}"
    dtype = encoder.get("feature_dtype", "float16")
    return f"{images:>9,} images  {encoder.get('name')} layer {encoder.get('layer')}{pooling} {dtype}"

"""The feature cache on disk: what it says and keeps to, what it reads at a start, and what survives a kill."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mmpeft.data import features
from mmpeft.data.encoding import encode_images
from mmpeft.data.feature_cache import encoder_folder, image_keys, room, settings, shard_file
from mmpeft.data.feature_cache.settings import CacheConfig, cache_config
from mmpeft.data.features import FeatureCache
from mmpeft.data.images import image_key
from tests.data.counting_encoder import CountingEncoder

IMAGE_BYTES = 2 * 3 * 2
"""Of `CountingEncoder`: 2 tokens x 3 in two bytes each."""


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(features, "SHARD_IMAGES", 2)


@pytest.fixture
def settled(images, monkeypatch):
    """The images, as if they had been there for a while; no call sets the time of a file's state."""
    monkeypatch.setattr(image_keys, "SETTLED_NS", 0)
    for image in images:
        os.utime(image, (1e9, 1e9))
    return images


def build(folder, images, **how):
    cache = FeatureCache(folder, CountingEncoder(), **how)
    cache.build(images)
    return cache


def shards(cache):
    return sorted(cache.directory.glob("*.safetensors"))


# -- size and limit


def test_it_says_its_size_before_it_begins(tmp_path, images, capsys):
    with pytest.raises(KeyboardInterrupt):
        FeatureCache(tmp_path / "cache", CountingEncoder(stop_after=0)).build(images)
    told = capsys.readouterr().err
    assert "7 images x 12 bytes (2 tokens x 3 in float16) are 0.000 GB, to write into" in told
    build(tmp_path / "cache", images[:3])
    capsys.readouterr()
    build(tmp_path / "cache", images)
    assert "feature cache: 4 images x 12 bytes" in capsys.readouterr().err


def test_what_is_larger_than_the_limit_is_not_written_but_encoded(tmp_path, images, capsys):
    cache = build(tmp_path / "cache", images, max_gb=(7 * IMAGE_BYTES - 1) / 1e9)
    told = capsys.readouterr().err
    assert "not written: 7 images" in told
    assert "data.cache.max_gb is 8.3e-08" in told
    assert not shards(cache)
    assert torch.equal(cache(images), encode_images(CountingEncoder(), images))
    assert shards(build(tmp_path / "cache", images, max_gb=7 * IMAGE_BYTES / 1e9))


def test_the_limit_counts_what_is_there_of_any_encoder(tmp_path, images):
    other = FeatureCache(tmp_path / "cache", CountingEncoder(layer=1))
    other.build(images)
    there = room.size_of(tmp_path / "cache")
    assert there > 7 * IMAGE_BYTES
    assert not shards(build(tmp_path / "cache", images, max_gb=there / 1e9))
    assert shards(build(tmp_path / "cache", images, max_gb=(there + 7 * IMAGE_BYTES) / 1e9))


@pytest.mark.parametrize(("gb", "fits"), [(14, True), (13, False)])
def test_what_another_promises_to_write_counts_as_written(tmp_path, images, capsys, gb, fits):
    """Of another encoder, whose shards are not there yet."""
    limit = gb * IMAGE_BYTES / 1e9
    first = FeatureCache(tmp_path / "cache", CountingEncoder(), max_gb=limit)
    other = FeatureCache(tmp_path / "cache", CountingEncoder(layer=1), max_gb=limit)
    decode, encoded = first.encoding.decode, []

    def meanwhile(image, config):
        if not encoded:
            encoded.append(None)
            encoded.append(other.build(images))
        return decode(image, config)

    first.encoding.decode = meanwhile
    assert first.build(images) == 7
    assert encoded[1] == (7 if fits else 0)
    assert ("not written: 7 images" in capsys.readouterr().err) is not fits


def test_room_is_looked_for_once_no_other_writes(tmp_path, images, capsys):
    """Two that began at once: what one has written while the other waited for it is seen."""
    paths = [tmp_path / f"other{number}.png" for number in range(7)]
    for number, path in enumerate(paths):
        Image.new("RGB", (3, 3), (9, 9, number)).save(path)
    first, second = (
        FeatureCache(tmp_path / "cache", CountingEncoder(), 8 * IMAGE_BYTES / 1e9) for _ in range(2)
    )
    assert second.store
    writing = second.store.writing

    def waiting(keys):
        assert first.build(images) == 7
        return writing(keys)

    second.store.writing = waiting
    assert second.build(paths) == 0
    assert len(shards(second)) == 1
    assert capsys.readouterr().err.count("not written: 7 images") == 1


def test_what_a_killed_process_promised_does_not_count(tmp_path, images):
    other = FeatureCache(tmp_path / "cache", CountingEncoder(layer=1))
    other.build(images)
    (other.directory / encoder_folder.PROMISE).write_text("1000000000")
    there = room.size_of(tmp_path / "cache")
    assert shards(build(tmp_path / "cache", images, max_gb=(there + 7 * IMAGE_BYTES) / 1e9))


@pytest.mark.parametrize(("free", "fits"), [(70 * IMAGE_BYTES, True), (70 * IMAGE_BYTES - 10, False)])
def test_by_itself_it_takes_a_tenth_of_the_free_disk(tmp_path, images, monkeypatch, capsys, free, fits):
    usage = namedtuple("usage", "total used free")(10**12, 0, free)
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: usage)
    assert bool(shards(build(tmp_path / "not yet" / "cache", images))) is fits
    assert "a tenth of the free disk; data.cache.max_gb sets" in capsys.readouterr().err


@pytest.mark.parametrize("limit", [0, -1, float("nan")])
def test_a_limit_that_is_none_is_refused(limit):
    with pytest.raises(ValueError, match=r"max_gb is .*above 0.*cache.build"):
        CacheConfig(max_gb=limit)


def test_the_setting_is_a_folder_or_a_section(monkeypatch, tmp_path):
    monkeypatch.setenv("MMPEFT_HOME", str(tmp_path))
    assert cache_config("somewhere").path == Path("somewhere")
    assert cache_config(None).path == cache_config("").path == tmp_path / "features"
    section = CacheConfig(max_gb=3)
    assert cache_config(section) is section


# -- shards


def test_shards_keep_to_their_size_and_are_ordinary_safetensors(tmp_path, images, monkeypatch):
    most = shard_file.HEADER_BYTES + 3 * IMAGE_BYTES
    monkeypatch.setattr(shard_file, "SHARD_BYTES", most)
    cache = build(tmp_path / "cache", images)
    assert [path.stat().st_size for path in shards(cache)].count(most) == 2
    assert max(path.stat().st_size for path in shards(cache)) == most
    rows = torch.cat([load_file(path)["features"] for path in shards(cache)])
    wanted = encode_images(CountingEncoder(), images)
    assert sorted(rows.flatten(1).tolist()) == sorted(wanted.flatten(1).tolist())


def test_rows_are_written_as_they_come(tmp_path):
    written = []
    path = tmp_path / "a.safetensors"

    def rows():
        for number in range(5):
            yield torch.full((2, 30_000), number, dtype=torch.float16)
            written.append((tmp_path / ".a.safetensors.part").stat().st_size)

    assert shard_file.write_shard(path, rows(), 9) == 5
    assert written == [shard_file.HEADER_BYTES + number * 120_000 for number in range(1, 6)]
    assert load_file(path)["features"][:, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert shard_file.write_shard(tmp_path / "b.safetensors", iter(()), 9) == 0
    assert not (tmp_path / "b.safetensors").exists()


def test_what_is_written_into_loaded_features_does_not_reach_the_disk(tmp_path, images):
    cache = build(tmp_path / "cache", images)
    wanted = cache(images)
    loaded = cache.load(images)[0]
    assert isinstance(loaded, torch.Tensor)
    loaded.zero_()
    encoder = CountingEncoder()
    assert torch.equal(FeatureCache(tmp_path / "cache", encoder)(images), wanted)
    assert encoder.encoded == 0


def test_bfloat16_has_a_folder_of_its_own_and_takes_what_float16_cannot(tmp_path, images):
    half = build(tmp_path / "cache", images)
    encoder = CountingEncoder(layer=10**10, dtype=torch.bfloat16)
    cache = FeatureCache(tmp_path / "cache", encoder)
    cache.build(images)
    wanted = encode_images(CountingEncoder(layer=10**10, dtype=torch.bfloat16), images)
    assert wanted.dtype == torch.bfloat16
    assert wanted.max() == torch.tensor(1e5, dtype=torch.bfloat16)
    again = FeatureCache(tmp_path / "cache", CountingEncoder(10**10, stop_after=0, dtype=torch.bfloat16))
    assert torch.equal(again(images), wanted)
    assert cache.directory != half.directory


# -- what a start reads


def forbid(monkeypatch, module, name):
    def fail(*_):
        raise AssertionError(f"{name} was called")

    monkeypatch.setattr(module, name, fail)


def test_a_second_start_reads_neither_shards_nor_images(tmp_path, settled, small_shards, monkeypatch):
    wanted = build(tmp_path / "cache", settled)(settled)
    forbid(monkeypatch, encoder_folder, "hash_file")
    forbid(monkeypatch, image_keys, "image_key")
    again = FeatureCache(tmp_path / "cache", CountingEncoder(stop_after=0))
    assert again.build(settled) == 0
    assert torch.equal(again(settled), wanted)


def test_a_copied_cache_is_read_whole_once(tmp_path, settled, small_shards, monkeypatch):
    wanted = build(tmp_path / "cache", settled)(settled)
    shutil.copytree(tmp_path / "cache", tmp_path / "copy", copy_function=shutil.copyfile)
    read = []
    whole = encoder_folder.hash_file
    monkeypatch.setattr(encoder_folder, "hash_file", lambda path: read.append(path) or whole(path))
    for _ in range(2):
        assert torch.equal(FeatureCache(tmp_path / "copy", CountingEncoder(stop_after=0))(settled), wanted)
    assert len(read) == 4


@pytest.mark.parametrize("change", ["content", "time", "size"])
def test_an_image_that_changed_is_read_again(tmp_path, settled, change):
    build(tmp_path / "cache", settled)
    path = Path(settled[2])
    if change == "time":
        os.utime(path, (1e9 + 1, 1e9 + 1))
    elif change == "size":
        path.write_bytes(path.read_bytes() + b"\0")
        os.utime(path, (1e9, 1e9))
    else:
        Image.new("RGB", (4, 4), (9, 9, 9)).save(path)
    encoder = CountingEncoder()
    cache = FeatureCache(tmp_path / "cache", encoder)
    assert cache.key(settled[2]) == image_key(settled[2])
    assert torch.equal(cache(settled), encode_images(CountingEncoder(), settled))
    assert encoder.encoded == (change != "time")


def test_the_key_of_a_file_that_has_just_changed_is_not_kept(tmp_path, images, monkeypatch):
    build(tmp_path / "cache", images)
    before = os.stat(images[0])
    content = Path(images[0]).read_bytes()
    Path(images[0]).write_bytes(content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])
    os.utime(images[0], ns=(before.st_atime_ns, before.st_mtime_ns))
    same = before.st_size, before.st_mtime_ns, before.st_ctime_ns, before.st_ino
    monkeypatch.setattr(image_keys, "file_version", lambda file: same)  # as within one tick of a coarse disk
    again = FeatureCache(tmp_path / "cache", CountingEncoder())
    assert again.key(images[0]) == image_key(images[0])


def test_images_that_change_places_are_told_apart_though_size_and_time_are_the_same(tmp_path, settled):
    """By ``mv``, and as ``cp -p``, ``rsync -t`` and archives put another version in an image's place."""
    first, second, third = settled[:3]
    sizes = {os.stat(image).st_size for image in (first, second, third)}
    assert len(sizes) == 1
    cache = build(tmp_path / "cache", settled)
    before = [cache.key(image) for image in (first, second, third)]
    assert len(set(before)) == 3
    os.rename(first, tmp_path / "aside")
    os.rename(second, first)
    os.rename(tmp_path / "aside", second)
    shutil.copyfile(first, third)
    os.utime(third, (1e9, 1e9))
    for seen in (
        cache,
        FeatureCache(tmp_path / "cache", CountingEncoder()),
    ):  # by this process, and by one before
        assert [seen.key(image) for image in (first, second, third)] == [before[1], before[0], before[1]]


def test_an_inode_of_64_bits_is_kept(tmp_path, settled, monkeypatch):
    version = 1, -1, 2, 2**64 - 1
    monkeypatch.setattr(image_keys, "file_version", lambda file: version)
    key = build(tmp_path / "cache", settled[:1]).key(settled[0])
    monkeypatch.setattr(image_keys, "image_key", None)  # it is not read again
    assert FeatureCache(tmp_path / "cache", CountingEncoder()).key(settled[0]) == key


def test_paths_are_told_apart_whatever_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(image_keys, "SETTLED_NS", 0)
    for number, name in enumerate(("a", "b")):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / name / "1.bmp")
        monkeypatch.chdir(tmp_path / name)
        cache = build(tmp_path / "cache", ["1.bmp"])
        assert cache.key("1.bmp") == image_key("1.bmp")


@pytest.mark.parametrize("content", [b"no database at all" * 100, b"SQLite format 3\0" + bytes(200)])
def test_a_damaged_store_of_keys_is_said_and_done_without(tmp_path, settled, capsys, content):
    build(tmp_path / "cache", settled)
    (tmp_path / "cache" / settings.KEYS).write_bytes(content)
    cache = FeatureCache(tmp_path / "cache", CountingEncoder(stop_after=0))
    assert cache.build(settled) == 0
    assert torch.equal(cache(settled), encode_images(CountingEncoder(), settled))
    assert capsys.readouterr().err.count("image_keys.sqlite cannot be used") == 1


def test_nothing_is_written_where_there_is_no_folder(tmp_path, images, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    cache = FeatureCache(None, CountingEncoder())
    assert cache.build(images) == 0
    assert torch.equal(cache(images), encode_images(CountingEncoder(), images))
    assert sorted(tmp_path.rglob("*")) == before


# -- damage, earlier versions, kills


@pytest.mark.parametrize("place", ["header", "shape"])
def test_a_header_that_says_otherwise_is_damage(tmp_path, images, capsys, place):
    victim = shards(build(tmp_path / "cache", images))[0]
    before, content = os.stat(victim), victim.read_bytes()
    other = content.replace(b"[7, 2, 3]", b"[7, 3, 2]") if place == "shape" else b"\xff" + content[1:]
    assert other != content
    victim.write_bytes(other)
    os.utime(victim, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a bit that flips on the disk
    cache = FeatureCache(tmp_path / "cache", CountingEncoder())
    assert torch.equal(cache(images), encode_images(CountingEncoder(), images))
    assert victim.name in capsys.readouterr().err


def test_features_of_an_earlier_version_are_encoded_again_and_said(tmp_path, images, capsys):
    old = tmp_path / "cache" / features._name(CountingEncoder().fingerprint)
    old.mkdir(parents=True)
    (old / "index.json").write_text(json.dumps({"encoder": CountingEncoder().fingerprint, "shards": []}))
    encoder = CountingEncoder()
    cache = FeatureCache(tmp_path / "cache", encoder)
    assert cache.build(images) == encoder.encoded == 7
    told = capsys.readouterr().err
    assert str(old) in told
    assert "mmpeft cache clear" in told


SLOW = """
import sys
from mmpeft.data import features
from tests.data.counting_encoder import CountingEncoder
features.SHARD_IMAGES = 2
folder, seconds, *images = sys.argv[1:]
print(features.FeatureCache(folder, CountingEncoder(seconds=float(seconds))).build(images), flush=True)
"""


def start(folder, seconds, images):
    words = [sys.executable, "-c", SLOW, str(folder), str(seconds), *images]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_killed_build_goes_on_after_its_last_whole_shard(tmp_path, images):
    folder = tmp_path / "cache"
    process = start(folder, 0.2, images)
    deadline = time.monotonic() + 60
    while len(list(folder.glob("*/*.index.json"))) < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = sum(map(len, encoder_folder.encoder_folders(folder)[0].shards()))
    assert kept >= 4
    encoder = CountingEncoder()
    cache = FeatureCache(folder, encoder)
    assert cache.build(images) == encoder.encoded == 7 - kept
    assert torch.equal(cache(images), encode_images(CountingEncoder(), images))
    assert not list(folder.glob("*/.*.part"))


def test_processes_share_the_work_and_the_later_says_that_it_waits(tmp_path, images):
    processes = [start(tmp_path / "cache", 0.1, images) for _ in range(2)]
    ended = [process.communicate(timeout=120) for process in processes]
    assert sorted(int(out) for out, _ in ended) == [0, 7], ended
    assert sum("waiting until it has ended" in err for _, err in ended) <= 1
    assert torch.equal(
        FeatureCache(tmp_path / "cache", CountingEncoder(stop_after=0))(images),
        encode_images(CountingEncoder(), images),
    )

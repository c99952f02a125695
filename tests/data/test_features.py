"""The feature cache: equal to encoding, encodes once, and never serves a wrong, stale or damaged entry."""

import json
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image

from mmpeft.data import features
from mmpeft.data.encoding import FEATURE_DTYPE, encode_images
from mmpeft.data.features import FeatureCache
from mmpeft.data.images import ImageConfig
from mmpeft.data.loader import PackedLoader
from mmpeft.data.plan import PackingConfig
from mmpeft.data.template import IGNORE_INDEX, IMAGE_TOKEN, Encoded
from mmpeft.errors import RefusedError
from mmpeft.models.vision import VisionConfig, VisionEncoder
from tests.data.counting_encoder import CountingEncoder

NUM_IMAGES = 7


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(features, "SHARD_IMAGES", 2)


def shards(cache):
    return sorted(cache.directory.glob("*.safetensors"))


def test_cached_features_equal_uncached_ones_bitwise(tmp_path, images):
    cache = FeatureCache(tmp_path / "cache", CountingEncoder())
    cache.build(images)
    fresh = encode_images(CountingEncoder(), images)
    for again in (cache, FeatureCache(tmp_path / "cache", CountingEncoder())):
        assert again(images).dtype == FEATURE_DTYPE
        assert torch.equal(again(images), fresh)
        assert torch.equal(again([images[3], images[1], images[3]]), fresh[[3, 1, 3]])


def test_cached_features_of_a_real_encoder_equal_uncached_ones_bitwise(tmp_path, tiny_base, tiny_data):
    encoder = VisionEncoder(VisionConfig("test_vit", str(tiny_base / "vision.safetensors"), image_size=32))
    squares = [str(path) for path in sorted((tiny_data / "images").glob("*.png"))]
    cache = FeatureCache(tmp_path, encoder)
    cache.build(squares)
    assert torch.equal(FeatureCache(tmp_path, encoder)(squares), encode_images(encoder, squares))


def test_images_are_read_as_the_encoder_says(tmp_path):
    wide = str(tmp_path / "wide.png")
    Image.new("I;16", (4, 4), 2048).save(wide)
    found = {}
    for scale in ("file", "fixed:0:4095", "fixed:0:65535"):
        encoder = CountingEncoder()
        encoder.image_config = ImageConfig(scale=scale)
        cache = FeatureCache(tmp_path / scale.replace(":", "-"), encoder)
        (memory,) = cache([wide])
        cache.build([wide])
        (disk,) = FeatureCache(cache.directory.parent, encoder)([wide])
        found[scale] = float(memory[0, 0] ** 2 * 7)
        assert torch.equal(memory, disk)
        assert torch.equal(memory, encode_images(encoder, [wide])[0])
        with Image.open(wide) as opened:
            assert torch.equal(memory, cache([opened])[0])
    assert found == pytest.approx({"file": 0, "fixed:0:4095": 128, "fixed:0:65535": 8}, abs=0.5)


def test_frames_of_one_file_have_features_of_their_own(tmp_path):
    frames = [Image.new("RGB", (4, 4), (value, 0, 0)) for value in (10, 20, 30)]
    frames[0].save(tmp_path / "pages.tif", save_all=True, append_images=frames[1:])
    names = [f"{tmp_path / 'pages.tif'}#frame={number}" for number in range(3)]
    cache = FeatureCache(tmp_path / "cache", CountingEncoder())
    cache.build(names)
    assert (cache(names)[:, 0, 0] ** 2 * 7).tolist() == pytest.approx([10, 20, 30], abs=0.1)


def test_a_second_build_encodes_nothing(tmp_path, images, small_shards):
    assert FeatureCache(tmp_path / "cache", CountingEncoder()).build(images) == NUM_IMAGES
    encoder = CountingEncoder()
    cache = FeatureCache(tmp_path / "cache", encoder)
    assert cache.build(images) == 0
    cache(images)
    assert encoder.encoded == 0


def test_equal_bytes_under_several_names_are_encoded_once(tmp_path, images):
    copy = tmp_path / "copy.png"
    copy.write_bytes(Path(images[0]).read_bytes())
    encoder = CountingEncoder()
    FeatureCache(tmp_path / "cache", encoder).build([*images, str(copy), images[0], copy.read_bytes()])
    assert encoder.encoded == NUM_IMAGES


def test_images_never_built_are_encoded_when_asked_for(tmp_path, images):
    encoder = CountingEncoder()
    cache = FeatureCache(tmp_path / "cache", encoder)
    cache.build(images[:3])
    assert torch.equal(cache(images), encode_images(CountingEncoder(), images))
    assert encoder.encoded == NUM_IMAGES


def test_a_changed_image_is_encoded_anew(tmp_path, images):
    FeatureCache(tmp_path / "cache", CountingEncoder()).build(images)
    Image.new("RGB", (4, 4), (99, 99, 99)).save(images[2])
    encoder = CountingEncoder()
    changed = FeatureCache(tmp_path / "cache", encoder)(images)
    assert encoder.encoded == 1
    assert torch.equal(changed, encode_images(CountingEncoder(), images))


def test_a_changed_encoder_does_not_see_the_old_features(tmp_path, images):
    FeatureCache(tmp_path / "cache", CountingEncoder(layer=0)).build(images)
    encoder = CountingEncoder(layer=1)
    changed = FeatureCache(tmp_path / "cache", encoder)(images)
    assert encoder.encoded == NUM_IMAGES
    assert torch.equal(changed, encode_images(CountingEncoder(layer=1), images))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "gone"])
def test_a_damaged_shard_is_encoded_again_and_no_other(tmp_path, images, small_shards, capsys, damage):
    cache = FeatureCache(tmp_path / "cache", CountingEncoder())
    cache.build(images)
    victim = shards(cache)[0]
    content = victim.read_bytes()
    if damage == "gone":
        victim.unlink()
    else:
        middle = bytes([content[-3] ^ 1])
        victim.write_bytes(content[:-5] if damage == "truncated" else content[:-3] + middle + content[-2:])
    encoder = CountingEncoder()
    repaired = FeatureCache(tmp_path / "cache", encoder)
    assert torch.equal(repaired(images), encode_images(CountingEncoder(), images))
    assert 1 <= encoder.encoded <= 2
    assert victim.name in capsys.readouterr().err
    assert FeatureCache(tmp_path / "cache", CountingEncoder(stop_after=0)).build(images) == 0


def test_images_of_a_damaged_shard_are_written_again_whenever_they_are_asked_for(tmp_path, images):
    cache = FeatureCache(tmp_path / "cache", CountingEncoder())
    cache.build(images)
    shards(cache)[0].write_bytes(b"")
    cache = FeatureCache(tmp_path / "cache", CountingEncoder())
    for image in images:
        cache([image])
    assert FeatureCache(tmp_path / "cache", CountingEncoder()).build(images) == 0


def test_files_that_a_killed_build_left_are_ignored(tmp_path, images):
    cache = FeatureCache(tmp_path / "cache", CountingEncoder())
    cache.directory.mkdir(parents=True)
    left = [
        ".0123456789abcdef.safetensors.part",
        ".0123456789abcdef.index.json.part",
        "0123456789abcdef.safetensors",
    ]
    for name in left:
        (cache.directory / name).write_bytes(b"half")
    cache.build(images)
    assert not any((cache.directory / name).exists() for name in left)
    assert torch.equal(cache(images), encode_images(CountingEncoder(), images))


@pytest.mark.parametrize("content", ["", '{"size": 12, "mti', '{"size": 12}', "[]"])
def test_a_damaged_index_is_rebuilt_and_no_other(tmp_path, images, small_shards, capsys, content):
    cache = FeatureCache(tmp_path / "cache", CountingEncoder())
    cache.build(images)
    victim = shards(cache)[0].with_suffix(".index.json")
    victim.write_text(content)
    encoder = CountingEncoder()
    rebuilt = FeatureCache(tmp_path / "cache", encoder)
    assert 1 <= rebuilt.build(images) == encoder.encoded <= 2
    assert victim.name in capsys.readouterr().err
    assert torch.equal(rebuilt(images), encode_images(CountingEncoder(), images))


def test_features_of_another_encoder_in_the_folder_are_refused_by_field(tmp_path, images):
    cache = FeatureCache(tmp_path / "cache", CountingEncoder(layer=1))
    cache.build(images)
    encoder = cache.directory / "encoder.json"
    content = json.loads(encoder.read_text())
    content["weights"] = "other"
    encoder.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="weights is 'other', wanted 'abc'") as error:
        FeatureCache(tmp_path / "cache", CountingEncoder(layer=1))
    assert str(cache.directory) in str(error.value)
    assert "layer" not in str(error.value)


def test_an_interrupted_build_goes_on_after_its_last_whole_shard(tmp_path, images, small_shards):
    with pytest.raises(KeyboardInterrupt):
        FeatureCache(tmp_path / "cache", CountingEncoder(stop_after=5)).build(images)
    encoder = CountingEncoder()
    cache = FeatureCache(tmp_path / "cache", encoder)
    assert cache.build(images) == encoder.encoded == NUM_IMAGES - 4
    assert torch.equal(cache(images), encode_images(CountingEncoder(), images))


def test_two_builds_at_once_share_the_work(tmp_path, images, small_shards):
    encoders = [CountingEncoder(seconds=0.01) for _ in range(2)]
    caches = [FeatureCache(tmp_path / "cache", encoder) for encoder in encoders]
    threads = [threading.Thread(target=cache.build, args=(images,)) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(encoder.encoded for encoder in encoders) == NUM_IMAGES
    for cache in caches:
        assert torch.equal(cache(images), encode_images(CountingEncoder(), images))


def test_features_beyond_float16_are_refused(images):
    encoder = CountingEncoder(layer=10**10)
    with pytest.raises(ValueError, match="65504"):
        encode_images(encoder, images)


def test_what_was_begun_is_decoded_already_and_equals_a_call(tmp_path, images):
    encoder = CountingEncoder()
    cache = FeatureCache(tmp_path / "cache", encoder)
    cache.build(images[:3])
    end = cache.begin([*images, images[5]])
    assert encoder.encoded == NUM_IMAGES, "the counter counts what is decoded"
    assert torch.equal(end(), encode_images(CountingEncoder(), [*images, images[5]]))
    cache.begin(images)()
    assert encoder.encoded == NUM_IMAGES


def test_an_image_that_cannot_be_read_is_refused_where_it_is_wanted(tmp_path, images):
    Path(images[2]).write_bytes(b"no image")
    cache = FeatureCache(tmp_path / "cache", CountingEncoder())
    end, other = cache.begin(images), cache.begin(images[:2])
    assert len(other()) == 2
    with pytest.raises(RefusedError, match=r"2\.png"):
        end()


def test_others_decode_while_one_encodes(tmp_path, images):
    """Neither ends without the other."""
    together = threading.Barrier(2)

    class Waits(CountingEncoder):
        def __call__(self, pixels):
            together.wait(5)
            return super().__call__(pixels)

    cache = FeatureCache(tmp_path / "cache", Waits())
    end = cache.begin(images[:1])
    encoding = threading.Thread(target=end)
    encoding.start()
    decoded = cache.begin(images[1:2])
    together.wait(5)
    encoding.join()
    assert not together.broken
    assert callable(decoded)


@pytest.mark.parametrize("workers", [1, 4])
def test_batches_of_any_number_of_workers_encode_each_image_once_and_equally(tmp_path, images, workers):
    encoder = CountingEncoder(seconds=0.002)
    rows = [Encoded([1, *[IMAGE_TOKEN] * 2, 7], [IGNORE_INDEX] * 3 + [7], [image]) for image in images]
    packing = PackingConfig(batch_size=2, max_conversations=1)
    loader = PackedLoader(rows, FeatureCache(tmp_path / "cache", encoder), packing, None, 0, workers=workers)
    wanted = encode_images(CountingEncoder(), images)
    for batch in [*loader, *loader]:
        assert torch.equal(batch.features, wanted[batch.conversations.examples])
    assert encoder.encoded == NUM_IMAGES

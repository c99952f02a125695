"""Decoding in a process of its own: the same pixels, a limit in time, and no harm from one image to the next."""

import os
import signal
import time

import numpy as np
import pytest
from PIL import Image

from mmpeft.data.images import ImageConfig, ImageError, ImageWorker, load_image
from tests.data.image_corpus import DEEP, RGB
from tests.data.image_writers import pillow, png16

SLOW = Image.new("RGB", (11_000, 11_000))


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    path = tmp_path_factory.mktemp("slow") / "slow.png"
    SLOW.save(path, compress_level=1)
    return str(path)


def test_the_pixels_are_those_of_load_image(tmp_path):
    path = tmp_path / "deep.png"
    path.write_bytes(png16(DEEP)())
    config = ImageConfig(scale="fixed:0:4095")
    with ImageWorker() as worker:
        for image in (str(path), path, path.read_bytes(), Image.fromarray(RGB)):
            np.testing.assert_array_equal(worker.load(image, config), load_image(image, config))
        with pytest.raises(ImageError) as here:
            load_image(tmp_path / "no.png")
        with pytest.raises(ImageError) as there:
            worker.load(tmp_path / "no.png")
        assert str(here.value) == str(there.value)
        assert worker._process is not None
    assert worker._process is None


def test_an_image_that_takes_too_long_is_refused_and_the_next_is_read(slow):
    png = pillow(RGB, "PNG")()
    with ImageWorker() as worker:
        worker.load(png)
        start = time.perf_counter()
        with pytest.raises(
            ImageError, match=r"slow\.png': decoding took longer than 0\.05 s \(image\.max_seconds\)"
        ):
            worker.load(slow, ImageConfig(max_seconds=0.05))
        assert time.perf_counter() - start < 5, "it did not wait for the end"
        assert worker._process is None, "nor does its process go on"
        np.testing.assert_array_equal(worker.load(png), RGB)


def test_a_decoder_that_dies_twice_over_an_image_fails_it_alone(monkeypatch):
    """Once it may have been killed from outside, and the image is as good as any."""
    png = pillow(RGB, "PNG")()
    begin, deaths = ImageWorker._started, iter([1, 1, 1])

    def killed(self):
        process = begin(self)
        if next(deaths, None):
            os.kill(process.pid, signal.SIGKILL)
        return process

    with ImageWorker() as worker:
        worker.load(png)
        monkeypatch.setattr(ImageWorker, "_started", killed)
        with pytest.raises(ImageError, match=r"its decoder ended with code -9, and again"):
            worker.load(png)
        np.testing.assert_array_equal(worker.load(png), RGB)
        assert next(deaths, None) is None, "the last one died over an image that was read"

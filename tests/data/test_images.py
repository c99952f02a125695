"""Every image through the one rule: the corpus is built here, byte by byte where pillow would refuse."""

import contextlib
import io
import os
import resource
import struct
import sys
import time
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, TiffImagePlugin

from mmpeft.data.images import FORMATS, UPRIGHT, ImageConfig, ImageError, image_key, load_image, read_bytes

RNG = np.random.default_rng(0)
PHOTO = Image.fromarray(RNG.integers(0, 256, (24, 36, 3), dtype=np.uint8))
"""Asymmetric, so that every turn and flip of it is another image."""


def encode(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def pixels(image) -> np.ndarray:
    return np.asarray(load_image(image))


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_header(width: int, height: int) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    data = png_chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + header + data + png_chunk(b"IEND", b"")


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_gives_rgb(form, tmp_path):
    data = encode(PHOTO, form)
    path = tmp_path / "photo.anything"
    path.write_bytes(data)
    image = load_image(data)
    assert (image.mode, image.size) == ("RGB", PHOTO.size)
    assert type(image) is Image.Image  # not an open file
    np.testing.assert_array_equal(pixels(path), pixels(data))
    np.testing.assert_array_equal(pixels(str(path)), pixels(data))
    if form in ("PNG", "BMP", "TIFF"):
        np.testing.assert_array_equal(pixels(data), np.asarray(PHOTO))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9])
def test_a_cut_file_is_an_error(form, kept):
    data = encode(PHOTO, form)
    with pytest.raises(ImageError, match=r"train\.jsonl:7: .*(cannot be decoded|known format)"):
        load_image(data[: int(len(data) * kept)], source="train.jsonl:7")


def test_a_cut_file_is_an_error_even_if_another_library_allows_them(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ImageError, match="LOAD_TRUNCATED_IMAGES"):
        load_image(encode(PHOTO, "JPEG")[:-300])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"not an image at all", "it begins b'not an image at"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "it begins b.<svg"),
        (b"8BPS\0\1", "found a Photoshop document; wanted one of JPEG, PNG"),
        (png_header(0, 5), "pixels|cannot be decoded|known format"),
    ],
)
def test_what_is_no_image_is_named(content, message, tmp_path):
    path = tmp_path / "cat.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=message) as caught:
        load_image(path)
    assert "cat.jpg" in str(caught.value)


@pytest.mark.parametrize("side", [20_000, 13_400, 11_314])
def test_the_pixel_cap_is_checked_before_decoding(side):
    data = png_header(side, side)
    rss, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises(ImageError, match=r"pixels.*at most|pixels; wanted"):
        load_image(data, source="bomb.png")
    assert time.perf_counter() - start < 0.5
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - rss
    assert grown < 50 * (1024 if sys.platform == "linux" else 2**20)


def test_the_pixel_cap_is_inclusive_and_holds_for_pil_images():
    assert load_image(PHOTO, ImageConfig(max_pixels=24 * 36)).size == (36, 24)
    with pytest.raises(ImageError, match="36 x 24"):
        load_image(PHOTO, ImageConfig(max_pixels=24 * 36 - 1))
    with pytest.raises(ImageError, match="0 x 3"):
        load_image(Image.new("RGB", (0, 3)))


def test_cmyk_jpeg_gives_the_colours_of_the_ink_product():
    inks = Image.fromarray(
        np.dstack([np.full((16, 16), v, np.uint8) for v in (200, 30, 90, 40)]), mode="CMYK"
    )
    expected = [(255 - ink) * (255 - 40) / 255 for ink in (200, 30, 90)]
    np.testing.assert_allclose(
        pixels(encode(inks, "JPEG", quality=100)).reshape(-1, 3).mean(0), expected, atol=2
    )


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_a_16_bit_ramp_keeps_its_greys(form):
    ramp = np.linspace(0, 65535, 256 * 16).astype(np.uint16).reshape(16, 256)
    data = encode(Image.fromarray(ramp), form)
    assert Image.open(io.BytesIO(data)).mode.startswith("I")
    out = pixels(data)
    assert abs(out.mean() - 127) <= 1
    assert (out.min(), out.max()) == (0, 255)


def test_wide_grey_is_scaled_from_its_own_range():
    dim = np.array([[1000, 2000, 3000]])
    expected = [0, 128, 255]
    for values in (dim.astype(np.uint16), dim.astype(np.int32), dim.astype(np.float32)):
        np.testing.assert_array_equal(pixels(Image.fromarray(values))[0, :, 0], expected)
    big_endian = Image.frombytes("I;16B", (3, 1), dim.astype(">u2").tobytes())
    np.testing.assert_array_equal(pixels(big_endian)[0, :, 0], expected)
    assert pixels(Image.fromarray(np.full((2, 2), 77, np.uint16))).max() == 0
    with pytest.raises(ImageError, match="NaN"):
        load_image(Image.fromarray(np.array([[0.0, np.nan]], np.float32)))


def exif(orientation) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.mark.parametrize("form", ["PNG", "TIFF", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_exif_orientations_give_one_image(form, orientation):
    undo = UPRIGHT.get(orientation)
    inverse = {Image.Transpose.ROTATE_90: Image.Transpose.ROTATE_270}
    inverse |= {value: key for key, value in inverse.items()}
    stored = PHOTO if undo is None else PHOTO.transpose(inverse.get(undo, undo))
    options = (
        {"lossless": True} if form == "WEBP" else {"quality": 100, "subsampling": 0} if form == "JPEG" else {}
    )
    data = encode(stored, form, exif=exif(orientation), **options)
    tolerance = 12 if form == "JPEG" else 0
    for image in (data, Image.open(io.BytesIO(data))):
        np.testing.assert_allclose(pixels(image).astype(int), np.asarray(PHOTO).astype(int), atol=tolerance)
    once = load_image(data)
    np.testing.assert_array_equal(pixels(once), np.asarray(once))  # a second load turns nothing


def test_damaged_exif_is_ignored():
    jpeg = encode(PHOTO, "JPEG")
    for body in (b"Exif\0\0" + b"\xff" * 20, b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0"):
        damaged = jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + jpeg[2:]
        np.testing.assert_array_equal(pixels(damaged), pixels(jpeg))
    for tags in (exif(99), b"neither byte order", b"II*\0\xff"):
        np.testing.assert_array_equal(pixels(encode(PHOTO, "PNG", exif=tags)), np.asarray(PHOTO))


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_counts(form):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if form == "WEBP" else {}
    data = encode(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 3
    assert (pixels(data) == [255, 0, 0]).all()


def test_transparency_is_composed_on_the_background():
    rgba = Image.new("RGBA", (2, 1))
    rgba.putpixel((0, 0), (10, 20, 30, 255))
    rgba.putpixel((1, 0), (10, 20, 30, 0))
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 9, 9, 9])
    palette.putpixel((1, 0), 1)
    for data in (
        encode(rgba, "PNG"),
        encode(palette, "PNG", transparency=1),
        encode(palette, "GIF", transparency=1),
    ):
        assert pixels(data).tolist() == [[[10, 20, 30], [255, 255, 255]]]
        on_grey = load_image(data, ImageConfig(background=(1, 2, 3)))
        assert np.asarray(on_grey).tolist() == [[[10, 20, 30], [1, 2, 3]]]
    half = Image.new("LA", (1, 1), (100, 128))
    assert np.asarray(load_image(encode(half, "PNG"), ImageConfig(background=(0, 0, 0))))[0, 0, 0] in (
        50,
        51,
    )
    assert pixels(encode(Image.new("RGB", (1, 1), "red"), "PNG", transparency=(255, 0, 0))).tolist() == [
        [[255] * 3]
    ]


@pytest.mark.parametrize("size", [(1, 1), (1, 10_000), (10_000, 1)])
def test_thin_images_load(size):
    assert load_image(encode(Image.new("L", size, 7), "PNG")).size == size


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "HSV", "I", "F", "PA", "RGBa"]
)
def test_every_pil_mode_loads_and_the_given_image_stays(mode):
    image = Image.new(mode, (3, 2))
    image.info["note"] = "kept"
    before = (image.mode, image.tobytes(), dict(image.info))
    out = load_image(image)
    assert (out.mode, out.size, out.info) == ("RGB", (3, 2), {})
    assert out is not image
    assert (image.mode, image.tobytes(), dict(image.info)) == before


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("missing.jpg", "does not exist"),
        ("a\0b.jpg", "cannot be read"),
        ("\ud800.jpg", "cannot be read"),
        ("x" * 5000, "cannot be read"),
        ("https://example.org/a.jpg", "URL"),
        (os.curdir, "not a regular file"),
        (os.devnull, "not a regular file"),
        (None, "found a NoneType"),
        ({"bytes": b""}, "found a dict"),
    ],
)
def test_bad_names_are_refused(bad, message):
    for call in (read_bytes, load_image, image_key):
        with pytest.raises(ImageError, match=message):
            call(bad)


def test_a_pipe_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(ImageError, match="not a regular file"):
        load_image(tmp_path / "pipe.jpg")


def test_the_byte_cap(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    assert read_bytes(tmp_path / "a", max_bytes=5) == read_bytes(b"12345", max_bytes=5) == b"12345"
    for image in (tmp_path / "a", b"12345"):
        with pytest.raises(ImageError, match="more than 4 bytes"):
            read_bytes(image, max_bytes=4)


def test_a_text_bomb_is_an_error():
    png = encode(PHOTO, "PNG")
    bomb = png_chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(80 * 2**20)))
    with pytest.raises(ImageError):
        load_image(png[:33] + bomb + png[33:])


def test_a_tiff_with_many_pages_loads_only_the_first():
    buffer = io.BytesIO()
    with TiffImagePlugin.AppendingTiffWriter(buffer, True) as writer:
        for _ in range(300):
            Image.new("L", (4, 4), 9).save(writer, "TIFF")
            writer.newFrame()
    start = time.perf_counter()
    assert load_image(buffer.getvalue()).size == (4, 4)
    assert time.perf_counter() - start < 0.2


def test_the_key_is_the_hash_of_content(tmp_path):
    data = encode(PHOTO, "PNG")
    (tmp_path / "a.png").write_bytes(data)
    assert image_key(data) == image_key(tmp_path / "a.png") == image_key(str(tmp_path / "a.png"))
    assert len(image_key(data)) == len(image_key(PHOTO)) == 64
    assert image_key(PHOTO) == image_key(Image.open(io.BytesIO(data)))
    wide, tall = Image.new("RGB", (2, 3)), Image.new("RGB", (3, 2))
    assert len({image_key(wide), image_key(tall), image_key(wide.tobytes()), image_key(data)}) == 4


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(FORMATS), st.data())
def test_damaged_bytes_give_an_image_or_an_image_error(form, data):
    content = bytearray(encode(PHOTO, form))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ImageError):
        assert load_image(bytes(content), ImageConfig(max_pixels=10**6)).mode == "RGB"

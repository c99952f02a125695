"""Every file of the corpus is read to the pixels that it means, or refused by name."""

import io

import numpy as np
import pytest

from mmpeft.data.images import FORMATS, ImageConfig, ImageError, image_key, image_size, load_image
from tests.data.image_corpus import CASES, DEEP, GREY, RGB
from tests.data.image_writers import compressed_dicom, dicom, pillow, png16, png_chunk, tiff

EXTRAS = {"tiff": "tifffile", "dicom": "pydicom", "nifti": "nibabel", "heic": "pillow_heif"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_file_is_read_as_it_is_meant_or_refused(case, tmp_path):
    for package in case.needs:
        pytest.importorskip(package)
    path = tmp_path / "picture.of a kind"
    path.write_bytes(case.data())
    if (package := EXTRAS.get(case.name.split()[0])) is not None:
        pytest.importorskip(package)
    name = str(path) if case.frame is None else f"{path}#frame={case.frame}"
    config = ImageConfig(**case.settings)
    if case.refused is not None:
        with pytest.raises(ImageError, match=f"(?s){case.refused}") as caught:
            load_image(name, config)
        assert str(path) in str(caught.value)
        return
    expected = case.expected if case.expected.ndim == 3 else np.dstack([case.expected] * 3)
    found = np.asarray(load_image(name, config))
    assert found.shape == expected.shape
    assert image_size(name, config) == found.shape[1::-1], "told by the header as by the pixels"
    np.testing.assert_allclose(found.astype(int), expected.astype(int), atol=case.atol)


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        ("file", (0, 4095)),
        ("fixed:0:65535", (0, 65535)),
        ("fixed:100:2000", (100, 2000)),
        ("window:2000:1000", (2000 - 0.5 - 999 / 2, 2000 - 0.5 + 999 / 2)),
        ("percentile", (0.01 * 4095, 0.99 * 4095)),
    ],
)
def test_every_scale_is_its_formula(scale, expected):
    ramp = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    black, white = expected
    formula = np.clip(np.rint((ramp.astype(float) - black) * 255 / (white - black)), 0, 255)
    np.testing.assert_array_equal(
        np.asarray(load_image(png16(ramp)(), ImageConfig(scale=scale)))[..., 0], formula
    )


def test_under_fixed_a_grey_picture_is_the_same_in_8_and_16_bits_but_for_rounding():
    config = ImageConfig(scale="fixed:0:65535")
    eight = np.asarray(load_image(pillow(GREY, "PNG")(), config)).astype(int)
    for values in (GREY.astype(np.uint16) * 257, GREY.astype(np.uint16) * 256 + 128):
        for write in (png16(values), pillow(values, "TIFF"), png16(np.dstack([values] * 3))):
            assert abs(np.asarray(load_image(write(), config)).astype(int) - eight).max() <= 1


@pytest.mark.parametrize("scale", ["fixed:0:4095", "window:0:1", "percentile"])
def test_images_of_8_bits_are_no_matter_of_the_scale(scale):
    np.testing.assert_array_equal(np.asarray(load_image(pillow(RGB, "PNG")(), ImageConfig(scale=scale))), RGB)


@pytest.mark.parametrize(
    "settings",
    [
        *(
            {"scale": scale}
            for scale in ("", "auto", "fixed", "fixed:1", "fixed:2:1", "fixed:0:nan", "window:5:0")
        ),
        {"frame": "last"},
        {"background": (0, 0, 256)},
        {"max_pixels": 0},
        {"max_pixels": 10**9},
        {"max_bytes": -1},
        {"max_seconds": 0},
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(settings):
    with pytest.raises(ValueError, match=f"image.{next(iter(settings))} is"):
        ImageConfig(**settings)


def test_the_identity_holds_what_changes_pixels_and_nothing_else():
    assert ImageConfig(max_pixels=5, max_bytes=5, max_seconds=5).identity == {}
    changed = {"scale": "percentile", "frame": "middle", "background": (0, 0, 0)}
    assert ImageConfig(**changed).identity == changed | {"background": [0, 0, 0]}, "as JSON has it"


def test_frames_of_a_file_are_other_images(tmp_path):
    path = tmp_path / "pages.tif"
    path.write_bytes(pillow(GREY, "TIFF", save_all=True, append_images=[])())
    names = [str(path), f"{path}#frame=0", f"{path}#frame=1"]
    assert len({image_key(name) for name in names}) == 3
    before = image_key(names[1])
    path.write_bytes(pillow(255 - GREY, "TIFF")())
    assert image_key(names[1]) != before


def test_a_file_that_is_called_like_a_frame_is_that_file(tmp_path):
    path = tmp_path / "odd.png#frame=3"
    path.write_bytes(pillow(RGB, "PNG")())
    np.testing.assert_array_equal(np.asarray(load_image(path)), RGB)


def test_which_of_several_frames_was_taken_is_said_once_a_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mmpeft.data.images.frames.NOTES.told", set())
    from PIL import Image

    others = [Image.fromarray(GREY), Image.fromarray(GREY)]
    for number in range(22):
        path = tmp_path / f"{number}.tif"
        path.write_bytes(pillow(GREY, "TIFF", save_all=True, append_images=others)())
        load_image(path)
        load_image(path)
        load_image(f"{path}#frame=1")
    said = capsys.readouterr().err.splitlines()
    assert "0.tif' has several frames: frame 0 is taken; name another as " in said[0]
    assert len(said) == 21, "twenty files, and that no more are named"
    load_image(pillow(RGB, "JPEG")())
    assert not capsys.readouterr().err


def test_a_missing_package_is_refused_with_the_extra_that_brings_it(monkeypatch, tmp_path):
    import sys

    for package in ("pydicom", "nibabel", "pillow_heif", "tifffile", "av"):
        monkeypatch.setitem(sys.modules, package, None)
    dcm = bytes(128) + b"DICM"
    nii = bytes(344) + b"n+1\0"
    for data, message in [
        (dcm, r"found DICOM, .*pip install 'mmpeft\[medical\]'"),
        (nii, r"found NIfTI, .*pip install 'mmpeft\[medical\]'"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", r"found HEIC, .*pip install 'mmpeft\[heic\]'"),
    ]:
        with pytest.raises(ImageError, match=message):
            load_image(data)
    (tmp_path / "clip").write_bytes(b"\x1a\x45\xdf\xa3")
    with pytest.raises(ImageError, match=r"found video, .*pip install 'mmpeft\[video\]'"):
        load_image(f"{tmp_path / 'clip'}#frame=1")


def test_deep_tiff_without_its_extra_is_refused(monkeypatch):
    import sys

    data = tiff(np.zeros((4, 4), np.float64))()
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(ImageError, match=r"TIFF of more than 8 bits.*pip install 'mmpeft\[tiff\]'"):
        load_image(data)


def test_dicom_is_what_pydicom_says():
    pydicom = pytest.importorskip("pydicom")
    import io

    from pydicom.pixels import apply_rescale, apply_windowing, pixel_array

    data = dicom(
        DEEP, WindowCenter=300, WindowWidth=900, RescaleSlope=1, RescaleIntercept=-1024, BitsStored=12
    )()
    scan = pydicom.dcmread(io.BytesIO(data))
    theirs = apply_windowing(apply_rescale(pixel_array(scan), scan), scan)
    theirs = (theirs - theirs.min()) * 255 / (theirs.max() - theirs.min())
    ours = np.asarray(load_image(data))[..., 0]
    assert abs(ours - theirs).max() <= 0.5 + 1e-9


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "MPO", "JPEG2000", "BMP", "GIF"])
@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 8])
def test_the_size_is_that_of_the_image_upright(tmp_path, form, orientation):
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = orientation
    says_so = form not in ("JPEG2000", "BMP", "GIF")
    path = tmp_path / "lying"
    path.write_bytes(pillow(RGB, form, **({"exif": exif} if says_so else {}))())
    wanted = (24, 36) if says_so and orientation > 4 else (36, 24)
    with Image.open(path) as opened:
        for image in (path, str(path), path.read_bytes(), opened):
            assert image_size(image) == load_image(image).size == wanted


def test_a_png_may_say_behind_its_pixels_that_it_lies(tmp_path):
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    data = pillow(RGB, "PNG")()
    late = data[:-12] + png_chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")) + data[-12:]
    assert image_size(late) == load_image(late).size == (24, 36)


def test_a_header_is_enough_for_the_size_of_ordinary_files(tmp_path):
    for form in ("JPEG", "PNG", "WEBP", "BMP"):
        path = tmp_path / form
        path.write_bytes(pillow(RGB, form)())

        def fail(*_, form=form):
            raise AssertionError(f"{form} was decoded")

        assert image_size(path, decode=fail) == (36, 24)
        path.write_bytes(path.read_bytes()[:20])
        with pytest.raises(ImageError):
            image_size(path)


def test_a_compressed_scan_without_its_decoder_is_refused_with_what_brings_it(monkeypatch):
    pixels = pytest.importorskip("pydicom.pixels")
    data = compressed_dicom(DEEP, "JPEGLosslessSV1", "ljpeg_encode", bitspersample=12)()
    monkeypatch.setattr(pixels.decoders.JPEGLosslessSV1Decoder, "_available", {})
    with pytest.raises(
        ImageError, match=r"JPEG Lossless, .*no decoder is installed; pip install 'mmpeft\[medical\]'"
    ):
        load_image(data)


MODES = (
    "1",
    "L",
    "LA",
    "La",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBa",
    "RGBX",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "F",
    "I;16",
)
LOSSY = {"JPEG": 14, "MPO": 14, "AVIF": 40}
"""Format -> by how much a value may differ."""


def of_mode(mode):
    """A smooth picture in a mode of pillow; half of what can be transparent is."""
    from PIL import Image

    ramp = np.add.outer(np.arange(24), np.arange(36)).astype(np.uint8) * 4
    colour = Image.fromarray(np.dstack([ramp, ramp[::-1], 255 - ramp]))
    if mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        colour.putalpha(Image.fromarray(np.where(ramp % 8, 255, 0).astype(np.uint8)))
    if mode in ("I", "F"):
        return Image.fromarray((ramp.astype(np.int32) if mode == "I" else ramp.astype(np.float32)) * 100)
    if mode == "I;16":
        return Image.fromarray(ramp.astype(np.uint16) * 100)
    if mode == "PA":
        return colour.quantize(16).convert("PA")
    if mode == "La":
        return colour.convert("LA").convert("La")
    if mode in ("LAB",):
        from PIL import ImageCms

        profiles = [ImageCms.createProfile(name) for name in ("sRGB", "LAB")]
        return ImageCms.profileToProfile(colour, *profiles, outputMode="LAB")
    return colour.convert(mode)


def pillows_own(stored):
    """What a file means, as pillow opens it: transparency on white, more than 8 bits from minimum to maximum."""
    from PIL import Image

    if stored.mode in ("I", "F", "I;16", "I;16B"):
        values = np.asarray(stored).astype(float)
        return np.dstack([np.rint((values - values.min()) * 255 / (values.max() - values.min()))] * 3)
    if stored.has_transparency_data:
        layer = Image.new("RGBA", stored.size, "white")
        layer.alpha_composite(stored.convert("RGBA"))
        stored = layer
    return np.asarray(stored.convert("RGB")).astype(int)


def written(form):
    """(mode, picture, file) of every mode that pillow writes a format of."""
    options = {"WEBP": {"lossless": True}, "JPEG2000": {"irreversible": False}}.get(form, {})
    for mode in MODES:
        image = of_mode(mode)
        try:
            yield mode, image, pillow(image, form, **options)()
        except (OSError, ValueError, KeyError, SystemError):
            continue


OTHERS = ("ICO", "TGA", "PCX", "SGI", "IM", "DDS", "EPS", "PDF", "ICNS", "MSP")
"""Of pillow, and not among those that are read."""


@pytest.mark.parametrize("form", [*FORMATS, "MPO", *OTHERS])
def test_whatever_pillow_writes_is_read_to_the_bit_or_refused_by_name(form):
    from PIL import Image

    files = list(written(form))
    assert files, "pillow writes it"
    for mode, image, data in files:
        try:
            stored = Image.open(io.BytesIO(data))
            stored.load()
        except (OSError, Image.UnidentifiedImageError):  # nor does pillow read it
            stored = None
        if form in OTHERS or stored is None:
            with pytest.raises(ImageError, match=r"wanted|install"):
                load_image(data)
            continue
        found = np.asarray(load_image(data)).astype(int)
        assert abs(found - pillows_own(stored)).max() <= 1, mode
        exact = ("L", "RGB") if form in LOSSY else ("L", "RGB", "1")
        if mode in exact and form != "GIF":  # whose colours are 256 at most
            assert abs(found - np.asarray(image.convert("RGB")).astype(int)).max() <= LOSSY.get(form, 0), mode

"""Tricky image files with the pixels that they mean, or why they are refused."""

import gzip
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from tests.data.image_writers import (
    compressed_dicom,
    dicom,
    dng,
    enhanced_dicom,
    heic,
    jpeg2000,
    netpbm,
    nifti,
    palette_dicom,
    pillow,
    png16,
    png_bomb,
    raw_tiff,
    table_dicom,
    tiff,
    twelve_bits,
)

RNG = np.random.default_rng(13)
RGB = RNG.integers(0, 256, (24, 36, 3), dtype=np.uint8)
GREY = RGB[..., 0]
DEEP = RNG.integers(0, 4096, (24, 36), dtype=np.uint16)
"""Grey of 12 bits in 16."""
DEEP_RGB = RNG.integers(0, 4096, (24, 36, 3), dtype=np.uint16)


@dataclass
class Case:
    """A file, and what must come of it."""

    name: str
    data: Callable[[], bytes]
    expected: Any = None
    """(height, width) or (height, width, 3) uint8."""
    refused: str | None = None
    """Else what the refusal matches."""
    needs: tuple[str, ...] = ()
    """Packages that read or write it."""
    settings: dict[str, Any] = field(default_factory=dict)
    frame: int | None = None
    atol: int = 0


def stretch(values: Any, black: float | None = None, white: float | None = None) -> np.ndarray:
    """The formula of `image.scale`."""
    values = np.asarray(values, np.float64)
    black = values.min() if black is None else black
    white = values.max() if white is None else white
    return np.clip(np.rint((values - black) * 255 / (white - black)), 0, 255).astype(np.uint8)


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Transparency that is all or nothing."""
    colour = colour if colour.ndim == 3 else np.dstack([colour] * 3)
    return np.where((alpha > 0)[..., None], colour, np.uint8(255))


# -- the files ----------------------------------------------------------------------------------------------

WINDOW = {"WindowCenter": 40, "WindowWidth": 400, "RescaleSlope": 2, "RescaleIntercept": -1000}
HOUNSFIELD = DEEP.astype(float) * 2 - 1000
SIGMOID = 1 / (1 + np.exp(-4 * (HOUNSFIELD - 40) / 400))
TURNED = np.array([[0, 0, 1, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1.0]])
VOLUME = RNG.integers(-500, 2000, (5, 7, 3)).astype(np.int16)
"""(right, front, up) in a RAS affine."""
FRAMES = RNG.integers(0, 4096, (3, 8, 10), dtype=np.uint16)
HALF = np.where(RNG.random((24, 36)) < 0.5, 0, 65535).astype(np.uint16)
COLOURS = RNG.integers(0, 65536, (16, 3)).astype(np.uint16)
INDICES = RNG.integers(0, 16, (8, 10), dtype=np.uint8)
FLOATS = RNG.normal(size=(24, 36))
SMOOTH = np.add.outer(np.arange(24), np.arange(36)).astype(np.uint16) * 60
SMOOTH_GREY = (SMOOTH // 16).astype(np.uint8)
"""What JPEG keeps well."""
JPEG2000 = {"codecformat": "j2k", "bitspersample": 12, "reversible": True, "level": 0}
HUGE = RNG.integers(0, 2**32, (24, 36), dtype=np.uint32)


def axial(number: int) -> np.ndarray:
    """The slice as a radiologist sees it: columns from right to left, rows from front to back."""
    return VOLUME[::-1, ::-1, number].T


def indexed(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values).quantize(16)


CASES = [
    # eight bits
    Case("jpeg", pillow(RGB, "JPEG", quality=100, subsampling=0), RGB, atol=12),
    Case("jpeg progressive", pillow(RGB, "JPEG", quality=100, subsampling=0, progressive=True), RGB, atol=12),
    Case("jpeg grey", pillow(GREY, "JPEG", quality=100), GREY, atol=4),
    Case("png grey", pillow(GREY, "PNG"), GREY),
    Case("png rgb", pillow(RGB, "PNG"), RGB),
    Case("png 1 bit", pillow(Image.fromarray(GREY > 99), "PNG"), (GREY > 99) * np.uint8(255)),
    Case("png palette", pillow(indexed(RGB), "PNG"), np.asarray(indexed(RGB).convert("RGB"))),
    Case("gif", pillow(indexed(RGB), "GIF"), np.asarray(indexed(RGB).convert("RGB"))),
    Case("webp", pillow(RGB, "WEBP", lossless=True), RGB),
    Case("bmp", pillow(RGB, "BMP"), RGB),
    Case("bmp grey", pillow(GREY, "BMP"), GREY),
    *(
        Case(f"tiff {c}", pillow(RGB, "TIFF", compression=c), RGB)
        for c in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits")
    ),
    Case(
        "tiff fax",
        pillow(Image.fromarray(GREY > 99), "TIFF", compression="group4"),
        (GREY > 99) * np.uint8(255),
    ),
    Case("tiff palette", pillow(indexed(RGB), "TIFF"), np.asarray(indexed(RGB).convert("RGB"))),
    Case("tiff planar", tiff(np.moveaxis(RGB, 2, 0), photometric="rgb", planarconfig="separate"), RGB),
    Case("tiff tiled", tiff(RGB, photometric="rgb", tile=(16, 16)), RGB),
    Case("tiff big", tiff(RGB, photometric="rgb", bigtiff=True), RGB),
    Case("tiff big end", tiff(RGB, photometric="rgb", byteorder=">"), RGB),
    Case("tiff white is zero", tiff(GREY, photometric="miniswhite"), 255 - GREY),
    Case("avif", pillow(RGB, "AVIF", quality=100, subsampling="4:4:4"), RGB, atol=6),
    Case("jpeg 2000", pillow(RGB, "JPEG2000", irreversible=False), RGB),
    Case("jpeg 2000 grey", pillow(GREY, "JPEG2000", irreversible=False), GREY),
    Case("heic", heic(np.dstack([GREY] * 3)), GREY, needs=("pillow_heif",), atol=6),
    Case("pbm", lambda: b"P1\n3 2\n1 0 1\n0 0 1\n", np.array([[0, 255, 0], [255, 255, 0]], np.uint8)),
    Case("pgm", netpbm(5, GREY, 255), GREY),
    Case("pgm plain", netpbm(2, GREY, 255), GREY),
    Case("pgm up to 100", netpbm(5, GREY % 101, 100), stretch(GREY % 101, 0, 100), atol=1),
    Case("ppm", netpbm(6, RGB, 255), RGB),
    Case("ppm plain", netpbm(3, RGB, 255), RGB),
    # more than eight bits: from minimum to maximum
    Case("png 16 grey", png16(DEEP), stretch(DEEP)),
    Case("png 16 rgb", png16(DEEP_RGB), stretch(DEEP_RGB)),
    Case("png 16 grey hidden", png16(DEEP, (int(DEEP[0, 0]),)), None),
    Case("png 16 rgb hidden", png16(DEEP_RGB, tuple(DEEP_RGB[0, 0].tolist())), None),
    Case("png 16 grey alpha", png16(np.dstack([DEEP, HALF])), None),
    Case("png 16 rgb alpha", png16(np.dstack([DEEP_RGB, HALF])), None),
    Case(
        "tiff 12 bit", lambda: raw_tiff(twelve_bits(DEEP), (36, 24), 12, white_is_zero=False), stretch(DEEP)
    ),
    Case("tiff 16", tiff(DEEP), stretch(DEEP)),
    Case(
        "tiff 16 big end",
        lambda: raw_tiff(DEEP.astype(">u2").tobytes(), (36, 24), 16, white_is_zero=False, order=">"),
        stretch(DEEP),
    ),
    Case(
        "tiff 16 white is zero",
        lambda: raw_tiff(DEEP.tobytes(), (36, 24), 16, white_is_zero=True),
        255 - stretch(DEEP),
    ),
    Case(
        "tiff 16 white is zero by its bits",
        lambda: raw_tiff(DEEP.tobytes(), (36, 24), 16, white_is_zero=True),
        255 - stretch(DEEP, 0, 4095),
        settings={"scale": "fixed:0:4095"},
    ),
    Case("tiff 16 signed", tiff(DEEP.astype(np.int16) - 2000), stretch(DEEP)),
    Case("tiff 8 signed", tiff(GREY.view(np.int8)), stretch(GREY.view(np.int8))),
    Case("tiff 32", tiff(HUGE), stretch(HUGE)),
    Case("tiff 32 signed", tiff(HUGE.view(np.int32)), stretch(HUGE.view(np.int32))),
    Case("tiff float 16", tiff(FLOATS.astype(np.float16)), stretch(FLOATS.astype(np.float16))),
    Case("tiff float 32", tiff(FLOATS.astype(np.float32)), stretch(FLOATS.astype(np.float32))),
    Case(
        "tiff float 32 predicted",
        tiff(FLOATS.astype(np.float32), predictor=3, compression="zlib"),
        stretch(FLOATS.astype(np.float32)),
        needs=("imagecodecs",),
    ),
    Case("tiff float 64", tiff(FLOATS), stretch(FLOATS)),
    Case("tiff float 64 white is zero", tiff(FLOATS, photometric="miniswhite"), 255 - stretch(FLOATS)),
    Case("tiff 16 rgb", tiff(DEEP_RGB, photometric="rgb"), stretch(DEEP_RGB)),
    Case(
        "tiff 16 rgb lzw",
        tiff(DEEP_RGB, photometric="rgb", compression="lzw", predictor=2),
        stretch(DEEP_RGB),
        needs=("imagecodecs",),
    ),
    Case(
        "tiff 16 rgb planar",
        tiff(np.moveaxis(DEEP_RGB, 2, 0), photometric="rgb", planarconfig="separate"),
        stretch(DEEP_RGB),
    ),
    Case(
        "tiff 16 rgb alpha",
        tiff(np.dstack([DEEP_RGB, HALF]), photometric="rgb", extrasamples=["unassalpha"]),
        None,
    ),
    Case("tiff third page", tiff(FRAMES, photometric="minisblack"), stretch(FRAMES[2]), frame=2),
    Case(
        "tiff middle page",
        tiff(FRAMES, photometric="minisblack"),
        stretch(FRAMES[1]),
        settings={"frame": "middle"},
    ),
    Case(
        "jpeg 2000 12 bit",
        jpeg2000(DEEP, 12),
        stretch(DEEP, 0, 4095),
        needs=("imagecodecs",),
        settings={"scale": "fixed:0:4095"},
    ),
    Case("jpeg 2000 16 bit", jpeg2000(DEEP * 16, 16), stretch(DEEP * 16), needs=("imagecodecs",)),
    Case("pgm 16", netpbm(5, DEEP, 4095), stretch(DEEP, 0, 4095), settings={"scale": "fixed:0:4095"}),
    Case("pgm 16 plain", netpbm(2, DEEP, 4095), stretch(DEEP)),
    Case("ppm 16", netpbm(6, DEEP_RGB, 4095), stretch(DEEP_RGB)),
    # scans
    Case(
        "dicom window",
        dicom(DEEP, **WINDOW),
        stretch(HOUNSFIELD, 40 - 0.5 - 399 / 2, 40 - 0.5 + 399 / 2),
        needs=("pydicom",),
    ),
    Case(
        "dicom window of the config",
        dicom(DEEP, **WINDOW),
        stretch(HOUNSFIELD, -600 - 0.5 - 1499 / 2, -600 - 0.5 + 1499 / 2),
        settings={"scale": "window:-600:1500"},
    ),
    Case(
        "dicom window exact",
        dicom(DEEP, **WINDOW, VOILUTFunction="LINEAR_EXACT"),
        stretch(HOUNSFIELD, -160, 240),
    ),
    Case("dicom sigmoid", dicom(DEEP, **WINDOW, VOILUTFunction="SIGMOID"), stretch(SIGMOID, 0, 1)),
    Case(
        "dicom enhanced",
        lambda: enhanced_dicom(FRAMES),
        stretch(FRAMES[2] * 3.0, 500 - 0.5 - 99 / 2, 500 - 0.5 + 99 / 2),
        frame=2,
    ),
    Case("dicom table", lambda: table_dicom(INDICES), stretch(2 ** INDICES.astype(float), 0, 65535)),
    Case(
        "dicom windows",
        dicom(DEEP, WindowCenter=[1000, 5], WindowWidth=[200, 9]),
        stretch(DEEP, 1000 - 0.5 - 199 / 2, 1000 - 0.5 + 199 / 2),
    ),
    Case("dicom no window", dicom(DEEP), stretch(DEEP)),
    Case("dicom negative", dicom(DEEP, "MONOCHROME1"), 255 - stretch(DEEP)),
    Case("dicom signed", dicom(DEEP.astype(np.int16) - 1000), stretch(DEEP)),
    Case("dicom 8 bit", dicom(GREY), GREY),
    Case("dicom 8 bit negative", dicom(GREY, "MONOCHROME1"), 255 - GREY),
    Case("dicom rgb", dicom(RGB, "RGB"), RGB),
    Case("dicom palette", palette_dicom(INDICES, COLOURS), stretch(COLOURS[INDICES], 0, 65535)),
    Case("dicom run length", dicom(DEEP, compress="RLE"), stretch(DEEP)),
    # what scanners and archives compress with; 12 bits without loss
    Case(
        "dicom jpeg lossless",
        compressed_dicom(DEEP, "JPEGLossless", "ljpeg_encode", bitspersample=12),
        stretch(DEEP),
        needs=("gdcm",),
    ),
    Case(
        "dicom jpeg lossless of first order",
        compressed_dicom(DEEP, "JPEGLosslessSV1", "ljpeg_encode", bitspersample=12),
        stretch(DEEP),
        needs=("gdcm",),
    ),
    Case(
        "dicom jpeg-ls",
        compressed_dicom(DEEP, "JPEGLSLossless", "jpegls_encode"),
        stretch(DEEP),
        needs=("gdcm",),
    ),
    Case(
        "dicom jpeg 2000",
        compressed_dicom(DEEP, "JPEG2000Lossless", "jpeg2k_encode", **JPEG2000),
        stretch(DEEP),
        needs=("gdcm",),
    ),
    Case(
        "dicom high-throughput jpeg 2000",
        compressed_dicom(DEEP, "HTJ2KLossless", "htj2k_encode"),
        stretch(DEEP),
        needs=("openjpeg",),
    ),
    Case(
        "dicom jpeg",
        compressed_dicom(SMOOTH_GREY, "JPEGBaseline8Bit", "jpeg8_encode", level=100),
        SMOOTH_GREY,
        atol=2,
    ),
    Case(
        "dicom jpeg 2000 of colour",
        compressed_dicom(
            RGB, "JPEG2000Lossless", "jpeg2k_encode", codecformat="j2k", reversible=True, level=0, mct=False
        ),
        RGB,
    ),
    Case("dicom first frame", dicom(FRAMES), stretch(FRAMES[0])),
    Case("dicom second frame", dicom(FRAMES), stretch(FRAMES[1]), frame=1),
    Case("nifti", nifti(VOLUME, np.eye(4)), stretch(axial(0)), needs=("nibabel",)),
    Case("nifti slice", nifti(VOLUME, np.eye(4)), stretch(axial(2)), frame=2),
    Case("nifti packed", lambda: gzip.compress(nifti(VOLUME, np.eye(4))()), stretch(axial(1)), frame=1),
    Case("nifti display range", nifti(VOLUME, np.eye(4), cal_min=0, cal_max=80), stretch(axial(0), 0, 80)),
    Case(
        "nifti left to right",
        nifti(VOLUME[::-1].copy(), np.diag([-1, 1, 1, 1.0])),
        stretch(axial(2)),
        frame=2,
    ),
    Case(
        "nifti head first",
        nifti(VOLUME[..., ::-1].copy(), np.diag([1, 1, -1, 1.0])),
        stretch(axial(0)),
        frame=0,
    ),
    Case("nifti axes turned", nifti(np.moveaxis(VOLUME, 0, 2).copy(), TURNED), stretch(axial(1)), frame=1),
    Case(
        "nifti second volume", nifti(np.stack([VOLUME + 9, VOLUME], 3), np.eye(4)), stretch(axial(1)), frame=4
    ),
    # refused
    Case(
        "tiff 16 cmyk",
        tiff(np.dstack([DEEP_RGB, DEEP]), photometric="separated"),
        refused="SEPARATED.*wanted grey or RGB",
    ),
    Case("tiff complex", tiff(FLOATS.astype(np.complex64)), refused="complex64 samples; wanted real"),
    Case(
        "tiff of five channels",
        tiff(np.dstack([DEEP] * 5), photometric="minisblack", planarconfig="contig"),
        refused="5 channels",
    ),
    Case("tiff nan", tiff(np.full((4, 4), np.nan, np.float32)), refused="NaN or infinite"),
    Case(
        "tiff fourth page",
        tiff(FRAMES, photometric="minisblack"),
        refused="frame 3 was asked for; there are 3",
        frame=3,
    ),
    Case(
        "jpeg 2000 12 bit colour",
        jpeg2000(DEEP_RGB, 12),
        refused="JPEG 2000 colour of 12 bits",
        needs=("imagecodecs",),
    ),
    Case("pgm 16 cut", lambda: netpbm(5, DEEP, 4095)()[:-9], refused="its header says 864"),
    Case("png 16 cut", lambda: png16(DEEP_RGB)()[:-400], refused="cannot be decoded"),
    Case("dicom without image", dicom(DEEP, "MONOCHROME3"), refused="MONOCHROME3"),
    Case(
        "dicom third frame",
        dicom(FRAMES),
        refused="frame 3 was asked for; there are 3 frames, 0 to 2",
        frame=3,
    ),
    Case(
        "dicom mpeg",
        compressed_dicom(DEEP, "MPEG2MPML", ""),
        refused="MPEG2 Main Profile.*no decoder is installed; write it uncompressed",
    ),
    Case(
        "dicom jpeg lossless cut",
        lambda: compressed_dicom(DEEP, "JPEGLosslessSV1", "ljpeg_encode", bitspersample=12)()[:-500],
        refused="without PixelData",
    ),
    Case(
        "dicom jpeg extended of 12 bits",
        compressed_dicom(SMOOTH, "JPEGExtended12Bit", "jpeg8_encode", bitspersample=12, level=100),
        refused="12 bits in 'JPEG Extended.*write it uncompressed",
    ),
    Case("dicom cut", lambda: dicom(DEEP)()[:-100], refused="cannot be decoded"),
    Case("nifti cut", lambda: nifti(VOLUME, np.eye(4))()[:-100], refused="cannot be decoded", frame=2),
    Case(
        "nifti packed cut",
        lambda: gzip.compress(nifti(VOLUME, np.eye(4))())[:-100],
        refused="gzip stream ends too early",
    ),
    Case(
        "nifti bomb",
        lambda: gzip.compress(nifti(VOLUME, np.eye(4))() + bytes(10**7)),
        refused="unpacked it has more than 1,000,000",
        settings={"max_bytes": 10**6},
    ),
    Case(
        "svg",
        lambda: b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>",
        refused="found an SVG",
    ),
    Case("web page", lambda: b"\n<!DOCTYPE html><html>404</html>", refused="found a web page"),
    Case("pdf", lambda: b"%PDF-1.7\n", refused="found a PDF"),
    Case("photoshop", lambda: b"8BPS\0\1" + bytes(99), refused="found a Photoshop"),
    Case("jpeg xl", lambda: b"\xff\x0a" + bytes(99), refused="found a JPEG XL"),
    Case("icon", lambda: b"\0\0\1\0\1\0" + bytes(99), refused="found an? icon"),
    Case("raw photo", lambda: b"\0\0\0\x18ftypcrx " + bytes(99), refused="found a camera raw"),
    Case("raw photo as tiff", lambda: dng(GREY), refused="camera raw"),
    Case("lfs", lambda: b"version https://git-lfs.github.com/spec/v1\n", refused="found a Git LFS pointer"),
    Case("gzip", lambda: gzip.compress(b"text"), refused="found a gzip"),
    Case("bomb", png_bomb, refused=r"20000 x 20000 pixels|400000000 pixels"),
    Case("video", lambda: b"\0\0\0\x18ftypisom" + bytes(99), refused="a video"),
]


def hidden(name: str, colour: np.ndarray, alpha: np.ndarray) -> None:
    """The range is that of the pixels that are seen."""
    seen = colour[alpha > 0]
    case = next(case for case in CASES if case.name == name)
    case.expected = on_white(stretch(colour, seen.min(), seen.max()), alpha)


hidden("png 16 grey hidden", DEEP, np.not_equal(DEEP, DEEP[0, 0]))
hidden("png 16 rgb hidden", DEEP_RGB, np.not_equal(DEEP_RGB, DEEP_RGB[0, 0]).any(2))
for own, name in (
    (DEEP, "png 16 grey alpha"),
    (DEEP_RGB, "png 16 rgb alpha"),
    (DEEP_RGB, "tiff 16 rgb alpha"),
):
    hidden(name, own, HALF)

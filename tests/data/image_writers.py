"""Writers of image files: with the libraries of each format, and byte by byte where none writes what is wanted."""

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image


def pillow(values: np.ndarray | Image.Image, form: str, **options: Any) -> Callable[[], bytes]:
    def write() -> bytes:
        image = values if isinstance(values, Image.Image) else Image.fromarray(values)
        buffer = io.BytesIO()
        image.save(buffer, form, **options)
        return buffer.getvalue()

    return write


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png16(values: np.ndarray, hidden: tuple[int, ...] = ()) -> Callable[[], bytes]:
    """PNG of 16 bits a sample, of 1 to 4 channels."""
    values = values if values.ndim == 3 else values[..., None]
    height, width, channels = values.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = values.astype(">u2").reshape(height, -1).view(np.uint8)
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))
    shown = png_chunk(b"tRNS", struct.pack(f">{len(hidden)}H", *hidden)) if hidden else b""
    data = (
        b"\x89PNG\r\n\x1a\n"
        + header
        + shown
        + png_chunk(b"IDAT", zlib.compress(lines))
        + png_chunk(b"IEND", b"")
    )
    return lambda: data


def tiff(values: np.ndarray, **options: Any) -> Callable[[], bytes]:
    def write() -> bytes:
        tifffile = pytest.importorskip("tifffile")
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, values, **options)
        return buffer.getvalue()

    return write


def raw_tiff(
    body: bytes, size: tuple[int, int], bits: int, *, white_is_zero: bool, order: str = "<"
) -> bytes:
    """An uncompressed grey TIFF of one strip."""
    width, height = size
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 0 if white_is_zero else 1, 273: 8}
    tags |= {277: 1, 278: height, 279: len(body)}
    entries = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8 + len(body))
    return start + body + struct.pack(order + "H", len(tags)) + entries + bytes(4)


def jpeg2000(values: np.ndarray, bits: int) -> Callable[[], bytes]:
    def write() -> bytes:
        return pytest.importorskip("imagecodecs").jpeg2k_encode(
            values, bitspersample=bits, reversible=True, level=0
        )

    return write


def netpbm(kind: int, values: np.ndarray, largest: int) -> Callable[[], bytes]:
    header = f"P{kind}\n# by hand\n{values.shape[1]} {values.shape[0]}\n{largest}\n".encode()
    if kind in (2, 3):
        return lambda: header + " ".join(map(str, values.ravel().tolist())).encode() + b"\n"
    return lambda: header + values.astype(">u2" if largest > 255 else np.uint8).tobytes()


def heic(values: np.ndarray) -> Callable[[], bytes]:
    def write() -> bytes:
        pillow_heif = pytest.importorskip("pillow_heif")
        buffer = io.BytesIO()
        pillow_heif.from_pillow(Image.fromarray(values)).save(buffer, quality=100)
        return buffer.getvalue()

    return write


def dicom(values: np.ndarray, kind: str = "MONOCHROME2", **attributes: Any) -> Callable[[], bytes]:
    """Values of shape ([frames,] rows, columns[, 3]); `compress="RLE"` and attributes by their names."""

    def write() -> bytes:
        pydicom = pytest.importorskip("pydicom")
        from pydicom.dataset import FileMetaDataset
        from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, RLELossless

        own = dict(attributes)
        compress = own.pop("compress", None)
        scan = pydicom.Dataset()
        scan.file_meta = FileMetaDataset()
        scan.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        scan.file_meta.MediaStorageSOPClassUID = scan.SOPClassUID = CTImageStorage
        scan.file_meta.MediaStorageSOPInstanceUID = scan.SOPInstanceUID = "1.2.3.4"
        colours = 3 if kind in ("RGB", "YBR_FULL") else 1
        shape = values.shape[:-1] if colours == 3 else values.shape
        scan.Rows, scan.Columns = shape[-2:]
        if len(shape) == 3:
            scan.NumberOfFrames = shape[0]
        scan.SamplesPerPixel, scan.PhotometricInterpretation = colours, kind
        if colours == 3:
            scan.PlanarConfiguration = 0
        scan.BitsAllocated = 8 * values.dtype.itemsize
        scan.BitsStored, scan.PixelRepresentation = scan.BitsAllocated, int(values.dtype.kind == "i")
        for name, value in own.items():
            setattr(scan, name, value)
        scan.HighBit = scan.BitsStored - 1
        scan.PixelData = values.tobytes()
        scan["PixelData"].VR = "OB" if values.dtype.itemsize == 1 else "OW"
        if compress == "RLE":
            scan.compress(RLELossless, generate_instance_uid=False)
        buffer = io.BytesIO()
        scan.save_as(buffer, enforce_file_format=True)
        return buffer.getvalue()

    return write


def compressed_dicom(values: np.ndarray, syntax: str, encode: str, **options: Any) -> Callable[[], bytes]:
    """One frame of 12 bits, or of 8 bits, compressed by imagecodecs.

    Args:
        syntax: pydicom's name of the transfer syntax.
        encode: imagecodecs' function.
        options: of it.
    """

    def write() -> bytes:
        pydicom, imagecodecs = pytest.importorskip("pydicom"), pytest.importorskip("imagecodecs")
        kind = "RGB" if values.ndim == 3 else "MONOCHROME2"
        bits = 8 * values.dtype.itemsize if values.dtype.itemsize == 1 else 12
        scan = pydicom.dcmread(io.BytesIO(dicom(values, kind, BitsStored=bits)()))
        frame = bytes(getattr(imagecodecs, encode)(values, **options)) if encode else b"no frame"
        scan.PixelData = pydicom.encaps.encapsulate([frame])
        scan["PixelData"].VR = "OB"
        scan["PixelData"].is_undefined_length = True
        scan.file_meta.TransferSyntaxUID = getattr(pydicom.uid, syntax)
        buffer = io.BytesIO()
        scan.save_as(buffer, enforce_file_format=True)
        return buffer.getvalue()

    return write


def nifti(values: np.ndarray, affine: np.ndarray, **header: float) -> Callable[[], bytes]:
    def write() -> bytes:
        nibabel = pytest.importorskip("nibabel")
        volume = nibabel.Nifti1Image(values, affine)
        for name, value in header.items():
            volume.header[name] = value
        return volume.to_bytes()

    return write


def palette_dicom(indices: np.ndarray, colours: np.ndarray) -> Callable[[], bytes]:
    tables = {
        f"{name}PaletteColorLookupTable{part}": value
        for name, own in zip(("Red", "Green", "Blue"), colours.T, strict=True)
        for part, value in (("Descriptor", [len(own), 0, 16]), ("Data", own.astype("<u2").tobytes()))
    }
    return dicom(indices, "PALETTE COLOR", **tables)


def _item(**attributes: Any) -> Any:
    from pydicom import Dataset

    item = Dataset()
    for name, value in attributes.items():
        setattr(item, name, value)
    return item


def enhanced_dicom(frames: np.ndarray) -> bytes:
    """Rescaling shared by all frames, a window for each: 100, 300, 500, all 100 wide."""
    pytest.importorskip("pydicom")
    rescale = _item(RescaleSlope=3, RescaleIntercept=0, RescaleType="US")
    windows = [_item(WindowCenter=100 + 200 * number, WindowWidth=100) for number in range(len(frames))]
    return dicom(
        frames,
        SharedFunctionalGroupsSequence=[_item(PixelValueTransformationSequence=[rescale])],
        PerFrameFunctionalGroupsSequence=[_item(FrameVOILUTSequence=[window]) for window in windows],
    )()


def table_dicom(indices: np.ndarray) -> bytes:
    """A VOI table of 16 entries: powers of two."""
    pytest.importorskip("pydicom")
    table = _item(LUTDescriptor=[16, 0, 16], LUTData=(2 ** np.arange(16)).astype("<u2").tobytes())
    return dicom(indices, VOILUTSequence=[table], BitsStored=4)()


def twelve_bits(values: np.ndarray) -> bytes:
    """Two samples in three bytes."""
    pairs = values.reshape(-1, 2).astype(np.uint32)
    packed = (pairs[:, 0] << 12) | pairs[:, 1]
    return np.dstack([packed >> 16, (packed >> 8) & 255, packed & 255]).astype(np.uint8).tobytes()


def dng(preview: np.ndarray) -> bytes:
    """A raw photo's first page is its preview."""
    buffer = io.BytesIO()
    Image.fromarray(preview).save(buffer, "TIFF", tiffinfo={50706: b"\1\4\0\0"})
    return buffer.getvalue()


def png_bomb() -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + png_chunk(b"IDAT", zlib.compress(bytes(1000)))
        + png_chunk(b"IEND", b"")
    )

"""NIfTI: an axial slice of a volume, radiologically (nibabel, the extra [medical])."""

import zlib
from typing import Any

import numpy as np

from mmpeft.data.images.config import ImageConfig
from mmpeft.data.images.depth import Samples
from mmpeft.data.images.formats import NIFTI, needs_extra
from mmpeft.data.images.frames import choose_frame
from mmpeft.data.images.source import ImageError, check_pixels


def read_slice(data: bytes, frame: int | None, config: ImageConfig, source: str) -> Samples:
    """A slice with its stored slope and intercept applied, and the display range of its header (cal_min, cal_max).

    Slices lie across the axis nearest to feet-head and are counted from the feet; of a series of volumes, those of the
    second follow those of the first. Columns run from the patient's right to the left, rows from front to back: the
    patient's right is on the picture's left. Pixels are not resampled where they are not square.

    Raises:
        ImageError: nibabel is not there, a pair of files (.hdr, .img), or samples that are no real numbers.
    """
    try:
        import nibabel  # pyright: ignore[reportMissingImports] an extra
    except ImportError:
        raise needs_extra(NIFTI) from None
    data = _unpacked(data, config.max_bytes)
    if data[344:348] == b"ni1\0" or data[4:8] == b"ni2\0":
        raise ImageError("the header of a NIfTI pair (.hdr, .img); save it as one .nii file")
    family = nibabel.Nifti2Image if data[4:8] == b"n+2\0" else nibabel.Nifti1Image
    volume = family.from_bytes(data)
    shape = volume.shape
    dtype: Any = volume.get_data_dtype()
    if len(shape) < 2 or dtype.kind not in "uif":
        raise ImageError(
            f"a NIfTI volume of {dtype} samples, shape {shape}; wanted real numbers in 2 or more axes"
        )
    shape = (*shape, 1)[:3] if len(shape) == 2 else shape
    places = nibabel.io_orientation(
        volume.affine
    )  # stored axis -> (axis of right, anterior, superior; direction)
    if np.isnan(places).any():
        raise ImageError("a NIfTI volume whose affine leaves out an axis; repair its header")
    right, front, up = (int(np.flatnonzero(places[:, 0] == axis)[0]) for axis in range(3))
    check_pixels((shape[right], shape[front]), config.max_pixels)
    count = int(np.prod(shape)) // (shape[right] * shape[front])
    number = choose_frame(frame, count, config.frame, source, "slices")
    series, place = divmod(number, shape[up])
    place = place if places[up, 1] > 0 else shape[up] - 1 - place
    index: list[int | slice] = [slice(None)] * 3
    index[up] = place
    index += [int(own) for own in np.unravel_index(series, shape[3:], order="F")]
    values = np.asanyarray(volume.dataobj[tuple(index[: len(volume.shape)])])
    values = values if right < front else values.T
    values = values[:: -int(places[right, 1]), :: -int(places[front, 1])].T
    black, white = float(volume.header["cal_min"]), float(volume.header["cal_max"])
    return Samples(values, window=(black, white) if white > black else None)


def _unpacked(data: bytes, max_bytes: int) -> bytes:
    if data[:2] != b"\x1f\x8b":
        return data
    unpacking = zlib.decompressobj(31)
    content = unpacking.decompress(data, max_bytes + 1)
    if len(content) > max_bytes:
        raise ImageError(f"unpacked it has more than {max_bytes:,} bytes (image.max_bytes); raise the limit")
    if not unpacking.eof:
        raise ImageError("its gzip stream ends too early; fetch it again")
    return content

"""DICOM: a frame of a scan with its rescaling, window and polarity (pydicom, the extra [medical])."""

import io
from typing import Any

import numpy as np
from PIL import Image

from mmpeft.data.images.config import ImageConfig
from mmpeft.data.images.depth import Samples, window_limits
from mmpeft.data.images.formats import DICOM, needs_extra
from mmpeft.data.images.frames import choose_frame
from mmpeft.data.images.source import ImageError, check_pixels

GREY = ("MONOCHROME1", "MONOCHROME2")
COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_PARTIAL_420", "YBR_ICT", "YBR_RCT", "PALETTE COLOR")


def read_dicom(data: bytes, frame: int | None, config: ImageConfig, source: str) -> Image.Image | Samples:
    """A frame's samples after the file's own rescaling (Hounsfield units for CT), with the window that it states.

    Of several windows the first counts. Grey of 8 bits without rescaling or window is taken as it is.

    Raises:
        ImageError: pydicom is not there, no image in the file, or one that cannot be read by name of its kind.
    """
    try:
        import pydicom  # pyright: ignore[reportMissingImports] an extra
        from pydicom import pixels  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise needs_extra(DICOM) from None
    scan = pydicom.dcmread(io.BytesIO(data))
    if "PixelData" not in scan:
        raise ImageError(f"a DICOM file without PixelData ({_kind(scan)}); wanted an image")
    check_pixels((int(scan.Columns), int(scan.Rows)), config.max_pixels)
    number = choose_frame(frame, int(scan.get("NumberOfFrames") or 1), config.frame, source)
    kind = str(scan.PhotometricInterpretation)
    if kind not in GREY + COLOUR:
        raise ImageError(f"a DICOM image of the kind {kind}; wanted one of {', '.join(GREY + COLOUR)}")
    _require_decoder(scan)
    values = pixels.pixel_array(scan, index=number)
    if kind == "PALETTE COLOR":
        values = pixels.apply_color_lut(values, scan)
        full = 255 / np.iinfo(values.dtype).max
        return Image.fromarray(np.rint(values * full).astype(np.uint8))
    if kind not in GREY:
        return Image.fromarray(values) if values.dtype == np.uint8 else Samples(values)
    return _grey(values, scan, number, kind == "MONOCHROME1", config)


def _require_decoder(scan: Any) -> None:
    """Raises:
    ImageError: the pixels are compressed in a way that no installed package reads.
    """
    from pydicom import pixels, uid  # pyright: ignore[reportMissingImports]

    syntax, bits = scan.file_meta.TransferSyntaxUID, int(scan.BitsStored)
    what_to_do = "write it uncompressed, such as with dcmtk's `dcmdjpeg`"
    try:
        known = pixels.get_decoder(syntax)
        if known.is_available and (syntax != uid.JPEGExtended12Bit or bits == 8):
            return
        if not known.is_available:
            what_to_do = "pip install 'mmpeft[medical]' brings its decoder"
    except NotImplementedError:  # of no syntax that pydicom knows pixels of
        pass
    raise ImageError(
        f"a DICOM image of {bits} bits in {syntax.name!r}, for which no decoder is installed; {what_to_do}"
    )


def _grey(
    values: np.ndarray, scan: Any, frame: int, inverted: bool, config: ImageConfig
) -> Image.Image | Samples:
    from pydicom import pixels  # pyright: ignore[reportMissingImports]

    transform = _group(scan, frame, "PixelValueTransformationSequence")
    is_rescaled = "ModalityLUTSequence" in scan or (
        float(transform.get("RescaleSlope") or 1) != 1 or float(transform.get("RescaleIntercept") or 0) != 0
    )
    if is_rescaled:
        values = pixels.apply_modality_lut(values, transform)
    samples = Samples(values, inverted)
    voi = _group(scan, frame, "FrameVOILUTSequence")
    centre, width = _first(voi.get("WindowCenter")), _first(voi.get("WindowWidth"))
    if config.scale == "file" and centre is not None and width is not None:
        return _windowed(samples, centre, width, str(voi.get("VOILUTFunction") or "LINEAR"))
    if config.scale == "file" and "VOILUTSequence" in voi:
        top = 2 ** int(voi.VOILUTSequence[0].LUTDescriptor[2]) - 1
        return Samples(pixels.apply_voi(values, voi), inverted, window=(0, top))
    if int(scan.BitsStored) == 8 and values.dtype == np.uint8 and not is_rescaled:
        return Image.fromarray(255 - values if inverted else values)
    return samples


def _windowed(samples: Samples, centre: float, width: float, function: str) -> Samples:
    """Source: PS3.3 C.11.2.1.2 and C.11.2.1.3."""
    if width < (1 if function == "LINEAR" else 0):
        raise ImageError(f"a DICOM window of width {width}; set image.scale, such as window:40:400")
    if function == "LINEAR":
        samples.window = window_limits(centre, width)
    elif function == "LINEAR_EXACT":
        samples.window = centre - width / 2, centre + width / 2
    elif function == "SIGMOID":
        samples.values = 1 / (1 + np.exp(-4 * (samples.values.astype(np.float64) - centre) / width))
        samples.window = 0.0, 1.0
    else:
        raise ImageError(
            f"a DICOM window of the function {function!r}; set image.scale, such as window:40:400"
        )
    return samples


def _group(scan: Any, frame: int, sequence: str) -> Any:
    """What holds a frame's attributes: its own functional group, else the one that all frames share, else the file."""
    own = scan.get("PerFrameFunctionalGroupsSequence") or []
    for groups in [*own[frame : frame + 1], *(scan.get("SharedFunctionalGroupsSequence") or [])]:
        if sequence in groups:
            return groups[sequence].value[0]
    return scan


def _first(value: Any) -> float | None:
    if value is None or value == "":
        return None
    return float(value) if isinstance(value, int | float | str) else float(value[0])


def _kind(scan: Any) -> str:
    uid = scan.get("SOPClassUID")
    return getattr(uid, "name", None) or "of an unknown kind"

"""What a file is, by its content: which decoder reads it, or what its format is called where none does."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mmpeft.data.images.source import ImageError, read_head

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
"""What pillow decodes. Short on purpose: every further decoder is attack surface."""
ENDINGS = (
    *(
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".apng",
        ".webp",
        ".gif",
        ".bmp",
        ".dib",
        ".tif",
        ".tiff",
        ".avif",
    ),
    *(".jp2", ".j2k", ".jpx", ".jpc", ".ppm", ".pgm", ".pbm", ".pnm", ".heic", ".heif", ".hif"),
    *(".dcm", ".dicom", ".nii", ".nii.gz"),
)
"""How files that `load_image` reads are called; only for finding them in folders, never for reading them."""
VIDEO_ENDINGS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp")
"""How videos are called; for finding them as well. A transport stream's ``.ts`` is also that of programs."""

_STARTS = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    **dict.fromkeys((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), "TIFF"),
    **dict.fromkeys((b"\xff\x4f\xff\x51", b"\x00\x00\x00\x0cjP  "), "JPEG2000"),
}
"""How files of these formats begin; of the others more must be looked at."""
_HEIC = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
_AVIF = (b"avif", b"avis")
_VIDEO = (b"\x1a\x45\xdf\xa3", b"\0\0\1\xba", b"\0\0\1\xb3", b"FLV\1", b"\x30\x26\xb2\x75\x8e\x66\xcf\x11")
"""Matroska and WebM, MPEG, Flash, Windows Media."""
_UNREAD = (
    (b"8BPS", "Photoshop document"),
    (b"%PDF", "PDF"),
    (b"%!PS", "PostScript"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
    (b"\x76\x2f\x31\x01", "OpenEXR"),
    (b"#?RADIANCE", "Radiance HDR"),
    (b"\x00\x00\x01\x00", "icon (ICO)"),
    (b"PF\n", "PFM colour image"),
    (b"P7\n", "PAM image"),
    (b"DDS ", "DirectDraw surface"),
    (b"\x89HDF", "HDF5 file"),
    (b"\x93NUMPY", "NumPy array"),
    (b"PK\x03\x04", "ZIP archive"),
    (b"\x1f\x8b", "gzip file"),
    (b"BZh", "bzip2 file"),
    (b"II\x2a\x00\x10\x00\x00\x00CR", "camera raw file (CR2)"),
    (b"FUJIFILMCCD-RAW", "camera raw file (RAF)"),
    (b"version https://git-lfs", "Git LFS pointer instead of the file itself (run `git lfs pull`)"),
)


@dataclass(frozen=True)
class Kind:
    """A format that is not pillow's own, and the extra that reads it."""

    name: str
    extra: str


HEIC, DICOM, NIFTI, VIDEO = (
    Kind("HEIC", "heic"),
    Kind("DICOM", "medical"),
    Kind("NIfTI", "medical"),
    Kind("video", "video"),
)


def kind_of(head: bytes) -> Kind | None:
    """The kind of a file by its first bytes; None is left to pillow."""
    brand = head[8:12] if head[4:8] == b"ftyp" else b""
    end = min(_size(head), len(head)) if brand else 0
    brands = {head[start : start + 4] for start in range(16, end, 4)} | {brand}
    if head[128:132] == b"DICM":
        return DICOM
    if _is_nifti(head) or _is_nifti(_gunzipped(head)):
        return NIFTI
    if brand and not brands.isdisjoint(_AVIF):
        return None
    if brand and not brands.isdisjoint(_HEIC):
        return HEIC
    is_video = brand not in (b"", b"crx ") or head.startswith(_VIDEO) or head[:4] + head[8:12] == b"RIFFAVI "
    is_video = is_video or (
        len(head) > 376 and head[0] == head[188] == head[376] == ord("G")
    )  # a transport stream
    return VIDEO if is_video else None


def unknown(data: bytes) -> ImageError:
    """What to say of a file that pillow does not know."""
    wanted = f"wanted one of {', '.join(FORMATS)}, HEIC, DICOM or NIfTI: convert it, or drop the row"
    if name := next((name for magic, name in _UNREAD if data.startswith(magic)), None):
        return ImageError(f"found a {name}; {wanted}")
    if data[4:12] == b"ftypcrx ":
        return ImageError(f"found a camera raw file (CR3); {wanted}")
    start = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if b"<svg" in start:
        return ImageError(f"found an SVG drawing (it begins {data[:16]!r}); {wanted}")
    if start.startswith((b"<!doctype html", b"<html")):
        return ImageError(f"found a web page, as a failed download leaves it; {wanted}")
    return ImageError(f"no image of a known format (it begins {data[:16]!r}); {wanted}")


def needs_extra(kind: Kind) -> ImageError:
    """What to say where the package that reads a format is not there."""
    return ImageError(
        f"found {kind.name}, which the extra [{kind.extra}] reads: pip install 'mmpeft[{kind.extra}]'"
    )


def is_image_file(path: str | Path) -> bool:
    """Whether a file is called as images are or, where its name has no ending, begins like one."""
    return _is_called(path, ENDINGS, lambda head: kind_of(head) not in (None, VIDEO) or _is_pillows(head))


def is_video_file(path: str | Path) -> bool:
    """The same of videos."""
    return _is_called(path, VIDEO_ENDINGS, lambda head: kind_of(head) is VIDEO)


def _is_called(path: str | Path, endings: tuple[str, ...], begins: Callable[[bytes], bool]) -> bool:
    name = os.path.basename(path).lower()
    if name.endswith(endings):
        return True
    if "." in name.lstrip("."):
        return False
    try:
        return begins(read_head(str(path)))
    except ImageError:
        return False


def format_of(head: bytes) -> str:
    """The name of the format that a file's first bytes tell; "unknown" of others."""
    if kind := kind_of(head):
        return kind.name
    if head[:1] == b"P" and head[1:2] in b"123456" and head[2:3].isspace():
        return "PPM"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp":
        return "AVIF"
    return next((name for start, name in _STARTS.items() if head.startswith(start)), "unknown")


def _is_pillows(head: bytes) -> bool:
    """Whether a file that is of no other kind begins as one of `FORMATS` does."""
    return format_of(head) in FORMATS


def _size(head: bytes) -> int:
    return int.from_bytes(head[:4], "big")


def _is_nifti(head: bytes) -> bool:
    return head[344:348] in (b"n+1\0", b"ni1\0") or head[4:8] in (b"n+2\0", b"ni2\0")


def _gunzipped(head: bytes) -> bytes:
    """The first bytes of a gzip file's content."""
    import zlib

    if head[:2] != b"\x1f\x8b":
        return b""
    try:
        return zlib.decompressobj(31).decompress(head, 512)
    except zlib.error:
        return b""

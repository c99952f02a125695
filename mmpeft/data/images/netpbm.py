"""PGM and PPM of more than 8 bits, whose samples pillow multiplies (grey) or cuts to 8 bits (colour)."""

import re

import numpy as np

from mmpeft.data.images.depth import Samples
from mmpeft.data.images.source import ImageError

_HEADER = re.compile(rb"P([2356])(?:\s|#[^\n]*\n)+(\d+)(?:\s|#[^\n]*\n)+(\d+)(?:\s|#[^\n]*\n)+(\d+)\s")


def deep_netpbm(data: bytes) -> Samples | None:
    """The samples as they are stored; None where 8 bits hold them.

    Raises:
        ImageError: there are fewer samples than the header says, or larger ones.
    """
    match = _HEADER.match(data)
    if match is None or int(match[4]) < 256:
        return None
    kind, width, height, largest = (int(match[number]) for number in (1, 2, 3, 4))
    count = width * height * (3 if kind in (3, 6) else 1)
    if kind in (2, 3):
        plain = re.sub(rb"#[^\n]*", b"", data[match.end() :]).split()
        values = np.array(plain[:count], dtype=np.int64)
    else:
        body = data[match.end() : match.end() + 2 * count]
        values = np.frombuffer(body[: len(body) // 2 * 2], ">u2")
    if len(values) < count or (count and values.max() > largest):
        raise ImageError(
            f"a netpbm image of {len(values)} samples up to {values.max(initial=0)}; its header says {count} up to "
            f"{largest}; fetch or save it again"
        )
    return Samples(values.reshape((height, width, 3) if kind in (3, 6) else (height, width)))

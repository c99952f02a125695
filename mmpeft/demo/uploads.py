"""Uploaded images and videos, read as questions are about them, or refused by the names that they had."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mmpeft.data.images import ImageConfig, ImageError, load_image
from mmpeft.data.records import Record
from mmpeft.data.video import Video, is_video, times_of
from mmpeft.demo.asked import Upload
from mmpeft.errors import RefusedError

IMAGE_MB, VIDEO_MB = 20, 200
"""Largest files, in MiB: a minute or two of a phone's video."""

MOST_FRAMES = 32
"""Of a video that are asked about."""


def shows_video(upload: Upload) -> bool:
    """Whether an upload is a video, and no image, by its content.

    Raises:
        RefusedError: it is no longer there, or too large for an image.
    """
    if not os.path.isfile(upload.path):
        raise RefusedError(f"{upload.name} is no longer there; upload it again")
    if is_video(upload.path):
        return True
    if (size := os.path.getsize(upload.path)) > IMAGE_MB * 2**20:
        raise RefusedError(
            f"{upload.name} is too large: {size / 2**20:.0f} MiB; an image may have {IMAGE_MB}, save it smaller"
        )
    return False


class Shown:
    """The uploads of one question, decoded here once, whoever is asked about them.

    Raises:
        RefusedError: one cannot be read, also where the extra of videos is missing; it is named.
    """

    def __init__(self, uploads: Sequence[Upload], config: ImageConfig):
        self._config = config
        self._frames: dict[str, tuple[Image.Image, str]] = {}
        """Name of a frame -> it, and what it is called."""
        self.about = tuple(self._read(upload) for upload in uploads)
        """The images and videos, as `VisionLanguageModel.ask` takes them."""

    def put_into(self, record: Record) -> None:
        """Has a record that was made of `about` hold the frames themselves in place of their names."""
        images: list[Any] = [
            self._frames[own][0] if isinstance(own, str) else own for own in record["images"]
        ]
        record["images"] = images

    def title(self, image: Image.Image) -> str:
        """Of a frame which video it is of and when it is shown, of an image nothing."""
        return next((title for frame, title in self._frames.values() if frame is image), "")

    def _read(self, upload: Upload) -> Image.Image | Video:
        if not shows_video(upload):
            return load_image(Path(upload.path).read_bytes(), self._config, source=upload.name)
        video = Video(upload.path, upload.frames)
        try:
            names = video.names
            for name, seconds in zip(names, times_of(names) or (), strict=True):
                title = f"{upload.name}, {seconds:.1f} seconds"
                self._frames[name] = load_image(name, self._config, source=title), title
        except ImageError as error:
            told = str(error).replace(repr(upload.path), upload.name).replace(upload.path, upload.name)
            raise RefusedError(told) from None
        return video

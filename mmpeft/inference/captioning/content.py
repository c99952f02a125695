"""What an image or video is by its content: read once, and hashed, so that another in its place is known."""

from mmpeft.data.image_lists import Listed
from mmpeft.data.images import ImageConfig, image_key, read_bytes
from mmpeft.data.images.source import split_frame
from mmpeft.errors import RefusedError

DIGITS = 16
"""Of a content's hash that are kept."""


def content_of(listed: Listed, config: ImageConfig) -> tuple[str | bytes, str]:
    """An image as it is decoded, its file read once, and the key of its content; of a video its path, and the key of
    its first frame, which is the file's.

    Raises:
        RefusedError, OSError: it cannot be read; the message calls it by its name in the list.
    """
    image = listed.read()
    try:
        if listed.is_video:
            return image, image_key(f"{image}#frame=0", config)
        if isinstance(image, str) and split_frame(image)[1] is None:
            image = read_bytes(image, max_bytes=config.max_bytes)
        return image, image_key(image, config)
    except RefusedError as error:
        raise RefusedError(str(error).replace(str(image), listed.name)) from None


def content_digits(listed: Listed, config: ImageConfig) -> str:
    """What a shard keeps of an image's content; empty where it cannot be read."""
    try:
        return content_of(listed, config)[1][:DIGITS]
    except (RefusedError, OSError):
        return ""

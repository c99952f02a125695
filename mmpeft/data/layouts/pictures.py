"""The images of a row: under which key they are named, and what a value names: a file, bytes, or their base64 text."""

import base64
import binascii
import os
from typing import Any

from mmpeft.data.formats import DataError
from mmpeft.data.image_names import LONGEST_NAME, is_image_name
from mmpeft.data.layouts.bookkeeping import BESIDE_IMAGE
from mmpeft.data.layouts.fields import Fields
from mmpeft.data.layouts.image_root import ImageRoot
from mmpeft.data.layouts.names import plain, plain_names
from mmpeft.data.layouts.tags import PLACEHOLDER
from mmpeft.data.layouts.values import from_json, from_python, is_empty, short

SOURCES = (
    *("bytes", "base64", "image", "image_path", "image_url", "url", "path", "value", "file_name", "filename"),
)
"""Where an object that stands for an image holds it."""
KINDS = ("image", "image_url", "input_image", "image_path")
"""What an object that stands for an image may call itself under ``type``."""
HARMLESS = frozenset().union(*BESIDE_IMAGE.values()) | plain_names(
    "id license date_captured format mime_type media_type mode detail "
    "min_pixels max_pixels resized_height resized_width"
)
"""Further keys of such an object that change no pixel: whose it is, how it is written, its size, and how large another
model is to read it; the encoder here has a size of its own."""


def take_images(fields: Fields, root: ImageRoot) -> tuple[list[str | bytes], list[str]]:
    """The images that a row names under keys of its own, and these keys.

    Raises:
        DataError: they are named twice, or in a way that is not read.
    """
    refuse_audio(fields)
    paths = [key for key in fields.of("path") if _names_image(fields.row[key])]
    keys = _one_of(fields, fields.of("image") + paths)
    if not keys and (numbered := [key for key in fields.keys.numbered if key in fields.left]):
        images = [_resolve(value, root) for value in fields.take_all(numbered)]
        return images, numbered
    if not keys:
        keys = [key for key in fields.of("image id") if _has_file(fields.row[key], root)][:1]
    if not keys:
        return [], []
    return read_images(fields.take_key(keys[0]), root), keys


def refuse_audio(fields: Fields) -> None:
    """The one place where audio is met."""
    for key in fields.of("audio"):
        if not is_empty(value := fields.take_key(key)):
            raise DataError(
                f"{key} is {short(value)}: audio is not read; drop the row, or name {key} in data.ignore"
            )


def read_images(value: Any, root: ImageRoot) -> list[str | bytes]:
    """Paths and bytes behind the value of an image key: one image or a list of them."""
    if isinstance(value, str) and value[:1] not in ("[", "{"):
        return [_resolve(value, root)]
    value = from_python(from_json(value))
    if isinstance(value, dict) and value and all(PLACEHOLDER.fullmatch(str(key)) for key in value):
        value = [value[key] for key in sorted(value, key=_number)]  # MiniCPM-V: {"<image_00>": name, ...}
    return [_resolve(image, root) for image in (value if isinstance(value, list) else [value])]


def _number(tag: str) -> int:
    return int("".join(filter(str.isdigit, tag)) or 0)


def source_of(image: dict[str, Any]) -> Any:
    """What an object names as its image; None where it names none.

    Raises:
        DataError: it names several, or says something more that is not read.
    """
    said = {key: value for key, value in image.items() if not is_empty(value)}
    if said.get("type") in KINDS:
        del said["type"]
    given = {key: said.pop(key) for key in SOURCES if key in said}
    refuse_unread(said, "image", image)
    if "base64" in given and len(given) > 1:
        raise DataError(f"images are given more than once, under {[*given]}; keep one of them")
    if not given:
        return None
    source = given[_one_key(given)]
    is_bare = "base64" in given and isinstance(source, str) and not source.startswith("data:")
    return _decoded(source, source) if is_bare else source


def refuse_unread(said: dict[str, Any], what: str, whole: dict[str, Any]) -> None:
    """Raises:
    DataError: an object that stands for an image or video says something more of it, such as a page or a box.
    """
    if left := [key for key in said if plain(key) not in HARMLESS]:
        raise DataError(
            f"found the {what} {short(whole)}, of which {left} is not read; take it out, and write the {what} as it is "
            "to be seen (one page or frame of a file is its name#frame=3)"
        )


def _one_of(fields: Fields, keys: list[str]) -> list[str]:
    """Of several keys of a row the one that has the image; the others are taken."""
    if len(keys) < 2:
        return keys
    first = _one_key({key: fields.row[key] for key in keys})
    fields.take_all(key for key in keys if key != first)
    return [first]


def _one_key(given: dict[str, Any]) -> str:
    """The key that has the image, where the others are only its name.

    Raises:
        DataError: several have one.
    """
    keys = [key for key in given if not _is_address(given[key])] or [*given]
    held = [key for key in keys if _is_held(given[key])]
    names = {os.path.basename(str(given[key])) for key in keys if key not in held}
    if len(held) > 1 or len(names) > 1:
        raise DataError(f"images are given more than once, under {keys}; keep one of them")
    return (held or keys)[0]


def _is_address(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(("http://", "https://"))


def _is_held(value: Any) -> bool:
    return isinstance(value, bytes) or (isinstance(value, dict) and isinstance(value.get("bytes"), bytes))


def _names_image(value: Any) -> bool:
    value = from_json(value)
    return all(map(is_image_name, value)) if isinstance(value, list) and value else is_image_name(value)


def _has_file(value: Any, root: ImageRoot) -> bool:
    """Whether an image's number or name is also that of its file."""
    if isinstance(value, bool) or not isinstance(value, int | str) or not str(value).strip():
        return False
    return _names_image(value) or (len(str(value)) < LONGEST_NAME and root.find(str(value)) is not None)


def _resolve(image: Any, root: ImageRoot) -> str | bytes:
    """The absolute path or the bytes behind one image."""
    if isinstance(image, dict):
        given = source_of(image)
        image = _resolve(given, root) if isinstance(given, dict) else image if given is None else given
    if isinstance(image, bytes) and image:
        return image
    if isinstance(image, int) and not isinstance(image, bool):
        image = root.find(str(image)) or image
    if not isinstance(image, str):
        raise DataError(f"found the image {short(image)}; wanted a file name, or bytes that are not empty")
    if image.startswith("data:"):
        return _decoded(image.partition(",")[2], image)
    return _decoded(image, image) if len(image) > LONGEST_NAME else root.resolve(image)


def _decoded(text: str, shown: str) -> bytes:
    try:
        if decoded := base64.b64decode("".join(text.split()), validate=True):
            return decoded
    except (binascii.Error, ValueError):
        pass
    raise DataError(f"found the image {short(shown)}; wanted a local path, or an image as base64")

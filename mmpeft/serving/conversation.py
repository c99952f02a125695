"""OpenAI's messages -> a record: the run's template makes of it the prompt that training would have made."""

import base64
import binascii
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mmpeft.data.records import IMAGE_MARKER, Record, place_markers
from mmpeft.serving.refusals import HttpError, invalid
from mmpeft.serving.schemas import ImagePart, Message, TextPart

DATA_URL = re.compile(r"data:(?P<kind>[\w.+-]+/[\w.+-]+)?(?P<parameters>(?:;[^;,]*)*),", re.ASCII)
KINDS = ("image/", "application/dicom", "application/octet-stream")
"""Beginnings of the media types that an image may be sent as; its bytes say what it really is."""


@dataclass
class Posed:
    """What is asked, and where it stands in the request."""

    record: Record
    places: list[str]
    """Of its images."""
    where: str
    """Of the question."""


def read_messages(messages: Sequence[Message], task: str | None, max_images: int) -> Posed:
    """The conversation, whose last question is to be answered.

    Args:
        task: identifier that the run's questions begin with.
        max_images: that one request may hold.

    Raises:
        HttpError: roles in another order than system, user, assistant, user ...; an image that is no data URL.
    """
    first, system = 0, None
    if messages[0].role in ("system", "developer"):
        first, system = 1, _text(messages[0], "messages[0]")
    asked, images = messages[first:], dict[str, bytes]()
    for number, message in enumerate(asked, first):
        wanted = ("user", "assistant")[(number - first) % 2]
        if message.role != wanted:
            raise invalid(
                f"messages[{number}].role",
                f"messages[{number}] is of the {message.role}; wanted one of the {wanted}: a system turn at most "
                "first, then user and assistant in turns",
            )
    if not asked or asked[-1].role != "user":
        raise invalid("messages", "the last message must be the user's question")
    texts: list[str] = []
    for number, message in enumerate(asked, first):
        where = f"messages[{number}]"
        if message.role == "assistant":
            texts.append(_text(message, where))
            continue
        parts = list(_parts(message, where, images, max_images))
        if not any(part.strip() for part in parts):
            raise invalid(f"{where}.content", f"{where}.content is empty; ask something")
        texts.append("".join(parts))
    turns = list(zip(texts[::2], [*texts[1::2], None], strict=True))
    placed = place_markers(turns, len(images))
    record = Record(id="", images=[*images.values()], turns=placed, task=task, where="messages")
    if system:
        record["system"] = system
    return Posed(record, list(images), "messages")


def read_base64(text: str, where: str) -> bytes:
    """Bytes from base64, strictly.

    Raises:
        HttpError: it is none, or empty.
    """
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise invalid(where, f"{where} is no base64 ({error}); wanted the image's bytes in base64") from None
    if not data:
        raise invalid(where, f"{where} is empty; wanted the image's bytes in base64")
    return data


def plain_text(text: str, where: str) -> str:
    """The text, if it can be read as one: our marker of an image would put images elsewhere.

    Raises:
        HttpError: it cannot.
    """
    if IMAGE_MARKER in text:
        raise invalid(where, f"{where} holds {IMAGE_MARKER}, which stands for an image here: leave it out")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise invalid(
            where, f"{where} is no Unicode text: {error}; send pairs of surrogates, or none"
        ) from None
    return text


def too_many_images(number: int, most: int, where: str) -> HttpError:
    """400: more images than `Limits.images`."""
    return invalid(where, f"{where} is image {number}; a request may hold {most} (limits.images)")


def _text(message: Message, where: str) -> str:
    """Of a turn without images."""
    parts = [message.content] if isinstance(message.content, str) else message.content
    texts = [part if isinstance(part, str) else getattr(part, "text", None) for part in parts]
    if None in texts:
        raise invalid(
            f"{where}.content", f"{where}: images stand in the user's turns, not in the {message.role}'s"
        )
    text = plain_text("".join(map(str, texts)), f"{where}.content")
    if not text.strip():
        raise invalid(
            f"{where}.content", f"{where}.content, of the {message.role}, is empty; leave the message out"
        )
    return text


def _parts(message: Message, where: str, images: dict[str, bytes], max_images: int) -> Iterator[str]:
    """The texts of a user's turn with markers for its images, which are added to ``images`` by their places."""
    if isinstance(message.content, str):
        yield plain_text(message.content, f"{where}.content")
        return
    for number, part in enumerate(message.content):
        place = f"{where}.content[{number}]"
        if isinstance(part, TextPart):
            yield plain_text(part.text, f"{place}.text")
            continue
        if len(images) == max_images:
            raise too_many_images(len(images) + 1, max_images, place)
        url = f"{place}.image_url.url"
        images[url] = _image(part, url)
        yield IMAGE_MARKER


def _image(part: ImagePart, where: str) -> bytes:
    url = part.image_url.url
    found = DATA_URL.match(url)
    if found is None:
        raise invalid(
            where,
            f"{where} is {url[:60]!r}; this server fetches nothing: send the image itself as "
            "data:image/png;base64,...",
        )
    kind = (found["kind"] or "").lower()
    if not kind.startswith(KINDS):
        raise invalid(
            where, f"{where} is of the type {kind or 'text/plain'!r}; wanted an image, as data:image/png"
        )
    if not found["parameters"].lower().endswith(";base64"):
        raise invalid(where, f"{where} is not in base64; wanted data:{kind};base64,...")
    return read_base64(url[found.end() :], where)

"""Tags inside of texts: where images stand, in the spellings of public tools, and what cannot be read.

`<image>` is the marker of all of them here. ``<image 1>``, ``<|image_1|>``, ``<ImageHere>``, Qwen's
``<|vision_start|><|image_pad|><|vision_end|>`` and the like become it where a row has images; Qwen-VL's
``<img>path</img>`` names its image on the spot.
"""

import re
from collections.abc import Collection, Iterable

from mmpeft.data.formats import DataError

IMAGE_MARKER = "<image>"
"""Stands in a record's question where an image belongs."""
MARKER = re.compile(re.escape(IMAGE_MARKER))
PLACEHOLDER = re.compile(
    r"\(<image>\./</image>\)|<img><image></img>|<Image><image></Image>"
    r"|<\|vision_start\|>(?:<\|image_pad\|>|<image>)<\|vision_end\|>"
    r"|<(?i:image)[ _:]?(\d+)>|<\|image_(\d+)\|>|<\|image\|>|<\|image_pad\|>|(?!<image>)<(?i:image)>|<(?i:img)>"
    r"|<ImageHere>|<image_placeholder>|<ImageContent>"
)
INLINE = re.compile(r"<img>([^<>\n]+)</img>")
UNREAD = re.compile(
    r"<(?:video|audio|speech|bbox|ref-object)>|<\|(?:video|audio|video_pad|audio_\d+)\|>"
    r"|<(?:video|audio)[ _]\d+>|\[/EN#\d+/\w+"
    r"|<\|vision_start\|>(?!(?:<\|image_pad\|>|<image>)<\|vision_end\|>)"
    r"|(?<!<\|image_pad\|>)(?<!<image>)<\|vision_end\|>"
)
IN_BRACKETS = re.compile(r"\[(?:image|img)\]|!\[[^\]\n]*\]\([^()\s]+\)|(\[(?:image|img)[ _:]?\d+\])", re.I)
"""What may stand for an image in a question, and elsewhere is text; a number names the image that a marker places."""
Turn = tuple[str, str]
"""(role, text)"""


def read_tags(
    turns: list[Turn], has_images: bool, inline: list, as_text: Collection[str] = ()
) -> tuple[list[Turn], list[str]]:
    """The turns with `IMAGE_MARKER` where images stand.

    Args:
        has_images: whether the row names images outside of its texts.
        inline: images that were named inside of message parts; those of texts are appended.
        as_text: tags that are to be left as text.

    Raises:
        DataError: a tag stands for what cannot be read.
    """
    if all(text.count("<") == text.count(IMAGE_MARKER) and "[" not in text for _, text in turns):
        return turns, []
    _refuse_brackets(turns, as_text)
    for _, text in turns:
        found = UNREAD.findall(text) if "<" in text or "[/EN#" in text else ()
        if unread := next((tag for tag in found if tag not in as_text), None):
            hint = (
                f', or name "{unread}" in data.ignore to learn it as text'
                if unread[0] == "<"
                else ", or write it plain"
            )
            raise DataError(
                f"a text holds {unread}, which stands for something that is not read; drop the row{hint}"
            )
    named: list[str] = []
    if "<img>" not in as_text:
        turns = [(role, _inlined(text, named) if role == "user" else text) for role, text in turns]
    return _placed(turns, has_images or bool(inline), as_text), named


def refuse_tags(texts: Iterable[str], where: str, as_text: Collection[str] = ()) -> None:
    """Raises:
    DataError: a text in which no image can stand, such as a choice, holds a tag of one or of what is not read.
    """
    for text in texts:
        if tag := next((tag for tag in _tags(text) if tag == IMAGE_MARKER or tag not in as_text), None):
            hint = "" if tag == IMAGE_MARKER else f', or name "{tag}" in data.ignore to learn it as text'
            raise DataError(f"{where} hold {tag}; images stand in questions: drop the row{hint}")


def _tags(text: str) -> list[str]:
    if "<" not in text:
        return []
    return [tag[0] for own in (MARKER, UNREAD, PLACEHOLDER) for tag in own.finditer(text)]


def _refuse_brackets(turns: list[Turn], as_text: Collection[str]) -> None:
    placed = any(IMAGE_MARKER in text or PLACEHOLDER.search(text) for _, text in turns)
    for tag in (tag for role, text in turns if role == "user" for tag in IN_BRACKETS.finditer(text)):
        if tag[0] not in as_text and not (placed and tag[1]):
            raise DataError(
                f"a question holds {tag[0]}; write <image> where an image stands, and name it under a key of the row, "
                f'or name "{tag[0]}" in data.ignore to learn it as text'
            )


def _inlined(text: str, named: list[str]) -> str:
    named += [name.strip() for name in INLINE.findall(text)]
    return INLINE.sub(IMAGE_MARKER, text)


def _placed(turns: list[Turn], has_images: bool, as_text: Collection[str]) -> list[Turn]:
    """Other spellings of the marker become it."""
    found = [
        (role, tag) for role, text in turns for tag in PLACEHOLDER.finditer(text) if tag[0] not in as_text
    ]
    if not found:
        return turns
    first = found[0][1][0]
    if not has_images or any(role != "user" for role, _ in found):
        raise DataError(
            f"a text holds {first}, but "
            + ("it is no question's" if has_images else "the row names no image")
            + f'; name the image, or name "{first}" in data.ignore to learn it as text'
        )
    numbers = [int(tag[1] or tag[2]) for _, tag in found if tag[1] or tag[2]]
    if numbers and numbers not in (list(range(len(found))), list(range(1, 1 + len(found)))):
        raise DataError(
            f"found {[tag[0] for _, tag in found]}; wanted every image once and in order, from 0 or 1: write <image> "
            "for each"
        )
    return [
        (role, PLACEHOLDER.sub(lambda tag: tag[0] if tag[0] in as_text else IMAGE_MARKER, text))
        for role, text in turns
    ]

"""Parts of a message: texts, and images that are named between them."""

from typing import Any

from mmpeft.data.formats import DataError
from mmpeft.data.layouts.pictures import KINDS as IMAGE_KINDS
from mmpeft.data.layouts.pictures import source_of
from mmpeft.data.layouts.tags import IMAGE_MARKER
from mmpeft.data.layouts.values import as_text, from_json, is_absent, is_empty, short

TEXT_KINDS = ("text", "input_text", "output_text")
TYPES = (*TEXT_KINDS, *IMAGE_KINDS, "video", "video_url", "audio", "input_audio")
TEXTS = ("text", "value", "content")


def read_content(content: Any, name: str, inline: list) -> str:
    """The text of a message; images that its parts name are appended to ``inline``, a part of an image without a name
    as None. A text is parts as JSON only as OpenAI's ``content``, and only where each is of a known type: else it is
    what is said, as boxes of objects are."""
    if isinstance(content, str):
        parts = from_json(content) if name == "content" and content[:1] == "[" else None
        if not _are_typed(parts):
            return as_text(content, name)
        content = parts
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        return as_text(content, name)
    return "".join([part if isinstance(part, str) else _part(part, inline) for part in content])


def _are_typed(parts: Any) -> bool:
    kinds = [part.get("type") if isinstance(part, dict) else None for part in parts or ()]
    return bool(kinds) and all(kind in TYPES for kind in kinds)


def _part(part: Any, inline: list) -> str:
    said = (
        {key: value for key, value in part.items() if not is_absent(value)} if isinstance(part, dict) else {}
    )
    kind = said.pop("type", None) or _kind_of(said)
    if kind in TEXT_KINDS:
        key = next((key for key in TEXTS if key in said), "text")
        text = as_text(said.pop(key, None), "text part")
        _refuse_rest(said, part)
        return text
    if kind not in IMAGE_KINDS:
        wanted = "; name it under the row's key video, and write <video> here" if kind == "video" else ""
        told = f"{kind} is not read{wanted}" if kind else "wanted {type: text, text} or {type: image}"
        raise DataError(f"found the part {short(part)}; {told}")
    place = said.pop("index", None)
    if place is not None and place != len(inline):
        raise DataError(f"found the part {short(part)}; wanted images in the order of their index, from 0")
    inline.append(source_of(said))
    return IMAGE_MARKER


def _kind_of(said: dict) -> str | None:
    """Of a part without a type."""
    return next((key for key in ("text", "image", "image_url", "video", "audio") if key in said), None)


def _refuse_rest(said: dict, part: Any) -> None:
    if left := [key for key, value in said.items() if not is_empty(value)]:
        raise DataError(f"found {left} in the part {short(part)}, which is not read; take it out")

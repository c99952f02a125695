"""Who asks what in a row: the turns before the answer that the row gives under a key of its own."""

from typing import Any

from mmpeft.data.formats import DataError
from mmpeft.data.formats.classes import CLASS_INSTRUCTION
from mmpeft.data.layouts.conversations import read_history, read_turns
from mmpeft.data.layouts.fields import Fields
from mmpeft.data.layouts.names import plain
from mmpeft.data.layouts.tags import Turn
from mmpeft.data.layouts.values import as_text, from_json, is_empty

CAPTION_INSTRUCTION = "Describe this image."
"""The question of a caption row ({image, text}) without an `instruction`."""
SHAPES = (
    "{image | images, conversations: [{from, value}]}, {images, messages: [{role, content}]}, "
    "{image | file_name, question, answer | answers}, {image | file_name, text | caption} or {image, label}"
)
ANSWERED_BY = ("answer", "right choice", "chosen", "rejected", "label")
"""Meanings that answer a question."""
MOST_KEYS = 20
"""Of a row that a message names."""
ASKED_IN_TEXT = {"questionid", "qid"}
"""Names that make a `text` the question, as in LLaVA's files of questions."""


def take_turns(fields: Fields, has_image: bool, inline: list) -> list[Turn]:
    """The turns of a row, up to its last question where the answer stands under another key.

    Raises:
        DataError: nothing is asked, or it is not clear what.
    """
    if key := fields.key("conversations"):
        return read_turns(fields.take("conversations"), key, inline)
    if is_caption(fields):
        return _take_caption(fields, has_image)
    if fields.has("question") or fields.has("input"):
        return _take_question(fields, inline)
    if fields.has("text") and fields.names & ASKED_IN_TEXT:
        return [("user", as_text(fields.take("text"), "text"))]
    if fields.has("label") and has_image and not fields.has("text"):
        return [("user", CLASS_INSTRUCTION)]
    if fields.has("chosen"):
        return []
    raise DataError(f"found the keys {first_keys(fields.row)}; wanted one of {SHAPES}, or data.columns")


def asks(fields: Fields) -> bool:
    """Whether a row asks a question of its own."""
    if fields.has("conversations"):
        return True
    own = any(fields.has(meaning) for meaning in ("question", "input", "chosen"))
    return (own and not is_caption(fields)) or bool(fields.has("text") and fields.names & ASKED_IN_TEXT)


def is_caption(fields: Fields) -> bool:
    """Whether a row says what is in its image; the only question that may stand beside it is an `instruction`."""
    if any(fields.has(meaning) for meaning in (*ANSWERED_BY, "input")) or not _are_captions(fields):
        return False
    if any(plain(key) != "instruction" for key in fields.of("question")):
        return False
    asked = fields.names & ASKED_IN_TEXT and not fields.has("question")
    return fields.has("caption") or (fields.has("text") and not asked)


def lists_captions(fields: Fields) -> bool:
    """Whether a row has a list of captions, each of which alone would be one."""
    meaning = next((own for own in ("caption", "text") if fields.has(own)), None)
    if meaning is None or not is_caption(fields):
        return False
    key = fields.key(meaning)
    return isinstance(from_json(fields.row[str(key)]), list)


def _are_captions(fields: Fields) -> bool:
    """Whether the answers of several people, if there are some, are captions: the row's own is among them."""
    own = [fields.row[key] for key in fields.of("caption") + fields.of("text")]
    return all(text in from_json(fields.row[key]) for key in fields.of("answers") for text in own)


def _take_caption(fields: Fields, has_image: bool) -> list[Turn]:
    """The question; the caption itself is read as every other answer."""
    key = str(fields.key("caption" if fields.has("caption") else "text"))
    instruction = fields.take("question")
    if instruction is None and not has_image:
        raise DataError(
            f"found {key!r} without an image and without an instruction: nothing is asked;{_address(fields)} wanted "
            f"one of {SHAPES}"
        )
    held = from_json(fields.row[key])
    if isinstance(held, dict) and any(
        plain(str(own)) in ("question", "chosen", "conversations") for own in held
    ):
        raise DataError(
            f"{key!r} holds a whole row as JSON, with the keys {first_keys(held)}; write them as keys of the row"
        )
    return [("user", CAPTION_INSTRUCTION if instruction is None else as_text(instruction, "instruction"))]


def first_keys(row: dict[str, Any]) -> str:
    """The keys of a row, of very many the first."""
    names = sorted(row)
    more = f" and {len(names) - MOST_KEYS:,} more" if len(names) > MOST_KEYS else ""
    return f"{names[:MOST_KEYS]}{more}"


def _address(fields: Fields) -> str:
    """What to say of a row whose image is an address of the web alone."""
    where = [key for key in fields.left if str(fields.row[key]).startswith(("http://", "https://"))]
    return (
        f" {where[0]!r} is an address of the web: download the images first, and name the files;"
        if where
        else ""
    )


def _take_question(fields: Fields, inline: list) -> list[Turn]:
    key = fields.key("question")
    asked = fields.take("question") if key else None
    if isinstance(asked, list) and plain(str(key)) == "prompt":
        return read_turns(asked, str(key), inline)
    lines = [as_text(asked, str(key))] if key else []
    if not key or plain(key) == "instruction":
        lines += _take_lines(fields, "input")
    if isinstance(asked, str):
        _set_rendering_aside(fields, [line for line in lines if line])
    lines = [*_take_lines(fields, "context"), *lines]
    question = "\n".join(line for line in lines if line.strip()) or "\n".join(lines)
    history = fields.take("history")
    earlier = [] if is_empty(history) else read_history(history)
    return [*earlier, ("user", question)]


def _take_lines(fields: Fields, meaning: str) -> list[str]:
    key = fields.key(meaning)
    return [as_text(fields.take(meaning), key)] if key else []


def _set_rendering_aside(fields: Fields, lines: list[str]) -> None:
    """Alpaca's `text` is instruction, input and output once more, in a prompt."""
    key, answer = fields.key("text"), fields.key("answer")
    if key and answer and isinstance(text := fields.row[key], str):
        said = [*lines, str(fields.row[answer])]
        if all(own.strip() in text for own in said) and text != fields.row[answer]:
            fields.take("text")

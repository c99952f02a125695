"""Row layouts (LLaVA's conversations, OpenAI's messages, question and answer, captions) -> one `Record`.

`<image>` markers: the questions of a record hold exactly one per image, in the order of `images`; template
code replaces them by image spans. A row without markers gets them in front of its first question. Questions
lose outer whitespace, also that between their text and markers at either end ("<image>\\nWhat?" becomes
"<image>What?"). A record's only marker moves from the end of its question to the front. Answers are kept as
they are.
"""

import os
from collections import Counter
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from mmpeft.data.images import image_file
from mmpeft.data.readers import DataError
from mmpeft.errors import RefusedError

IMAGE_MARKER = "<image>"
"""Stands in a record's question where an image belongs."""
CAPTION_INSTRUCTION = "Describe this image."
"""The question of a caption row ({image, text}) without an `instruction`."""
CAPTION_TASK = "caption"
"""The task of rows whose answer describes the image."""
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
SHAPES = (
    "{image | images, conversations: [{from, value}]}, {images, messages: [{role, content}]}, "
    "{image | file_name, question, answer | answers} or {image | file_name, text}"
)


class Record(TypedDict):
    """One sample, whatever format it came from."""

    id: str
    images: list[str | bytes]
    """Absolute paths inside the image root, or encoded bytes (parquet)."""
    turns: list[tuple[str, str | None]]
    """(question, answer); only the last answer can be None, and only for prediction."""
    task: str | None
    choices: NotRequired[list[str]]
    """The allowed answers to the last question, if the row lists them: two or more, the right one among them."""
    references: NotRequired[list[str]]
    """All right answers to the last question, if the row lists several people's; the first is the turn's."""
    where: str
    """File and line (parquet: row), e.g. "train.jsonl:12"."""


def is_caption(record: Record) -> bool:
    """Whether the answer describes the image: by its task, or by what caption rows ask who name no instruction."""
    question = record["turns"][-1][0].replace(IMAGE_MARKER, "").strip()
    return record["task"] == CAPTION_TASK or question == CAPTION_INSTRUCTION


def place_of(record: Record) -> str:
    """What an error calls a record."""
    return f"{record['where']} (id {record['id']!r})" if record["id"] else record["where"]


def check_question(question: str, where: str) -> None:
    """Raises:
    RefusedError: nothing is asked; a marker of an image alone is a question.
    """
    if not question.strip():
        raise RefusedError(f'{where} is empty; write one, such as "what is in the picture?"')


class ImageRoot:
    """Turns image names into absolute paths and refuses those that lead out of one folder.

    Every name and every folder is resolved once: 40,000 rows in a few folders cost one `lstat` per name.
    """

    def __init__(self, root: Path) -> None:
        self._root = os.path.realpath(root)
        self._inside = os.path.join(self._root, "")
        self._folders: dict[str, str] = {}
        self._paths: dict[str, str] = {}

    def resolve(self, name: str) -> str:
        if name not in self._paths:
            self._paths[name] = self._resolve(_text(name, "image name"))
        return self._paths[name]

    def _resolve(self, name: str) -> str:
        if not name.strip() or "\0" in name or name.startswith(("http://", "https://", "data:")):
            raise DataError(f"found the image {_short(name)}; wanted a local path; download URLs first")
        folder, base = os.path.split(os.path.join(self._root, name))
        if folder not in self._folders:
            self._folders[folder] = os.path.realpath(folder)
        path = os.path.join(self._folders[folder], base)
        file = image_file(path)
        if base in ("", ".", "..") or os.path.islink(file):
            path = os.path.realpath(file) + path[len(file) :]
        if not path.startswith(self._inside):
            raise DataError(
                f"image {name!r} leads to {path}, outside the image root {self._root}; "
                "move the file inside, or pass the folder that holds all images as image_root"
            )
        return path


def make_record(
    row: Any, made_id: str, where: str, root: ImageRoot, task: str | None, require_answers: bool
) -> Record:
    """The record of one row.

    Args:
        made_id: Its id, if the row has none.
        task: Its task, if the row has none.
        require_answers: Whether the last question must have an answer.

    Raises:
        DataError: The row is not a valid sample, or is itself the `DataError` of a row that could not be read.
    """
    if isinstance(row, DataError):
        raise row
    if not isinstance(row, dict):
        raise DataError(f"found a {type(row).__name__}; wanted an object: {SHAPES}")
    row = {key: value for key, value in row.items() if value is not None}
    references = _people(row["answers"]) if "answers" in row else []
    written, inline = _turns(row)
    if references and len(written) % 2:
        written.append(("assistant", _most_frequent(references)))
    turns = _pairs(written, require_answers)
    named = [key for key in ("image", "images", "file_name") if key in row] + ["messages"] * bool(inline)
    if len(named) > 1:
        raise DataError(f"images are given more than once, under {named}; keep one of them")
    given = inline or (row[named[0]] if named else [])
    images = [_image(image, root) for image in (given if isinstance(given, list) else [given])]
    record = Record(
        id=_id(row.get("id", made_id)),
        images=images,
        turns=_place_markers(turns, len(images)),
        task=_text(row["task"], "task") if "task" in row else task,
        where=where,
    )
    answer = turns[-1][1]
    if "choices" in row:
        record["choices"] = _choices(row["choices"], answer)
    if references:
        record["references"] = _starting_with(str(answer), references)
    return record


def _turns(row: dict) -> tuple[list[tuple[str, str]], list]:
    """The (role, text) turns as written, and the images named inside message parts."""
    inline: list = []
    for shape, role, text in (("conversations", "from", "value"), ("messages", "role", "content")):
        if shape in row:
            return [_role_text(turn, role, text, inline) for turn in _list(row[shape], shape)], inline
    if "question" in row:
        question, answer = row["question"], row.get("answer")
    elif "text" in row or "instruction" in row:
        question, answer = row.get("instruction", CAPTION_INSTRUCTION), row.get("text")
    else:
        raise DataError(f"found the keys {sorted(row)}; wanted one of {SHAPES}")
    turns = [("user", _text(question, "question"))]
    if answer is not None:
        turns.append(("assistant", _text(answer, "answer")))
    return turns, inline


def _role_text(turn: Any, role_key: str, text_key: str, inline: list) -> tuple[str, str]:
    """Role and text of one turn; images named in its parts are appended to `inline`."""
    role = turn.get(role_key) if isinstance(turn, dict) else None
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(
            f"found the turn {_short(turn)}; wanted {role_key}: user or assistant, {text_key}: text"
        )
    content = turn.get(text_key)
    if text_key == "content" and isinstance(content, list):
        content = "".join([_part_text(part, inline) for part in content])
    return ROLES[role], _text(content, text_key)


def _part_text(part: Any, inline: list) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        return _text(part.get("text"), "text part")
    if kind not in ("image", "image_url"):
        raise DataError(f"found the part {_short(part)}; wanted {{type: text, text}} or {{type: image}}")
    sources = [part[key] for key in ("image", "image_url", "url", "path") if part.get(key) is not None]
    inline += sources[:1]
    return IMAGE_MARKER


def _pairs(turns: list[tuple[str, str]], require_answers: bool) -> list[tuple[str, str | None]]:
    for number, (role, text) in enumerate(turns, 1):
        wanted = "user" if number % 2 else "assistant"
        if role == "system":
            raise DataError("found a system turn; put its text into the template or the first question")
        if role != wanted:
            raise DataError(f"turn {number} is from the {role}; wanted the {wanted} (in turns, user first)")
        if role == "assistant" and (IMAGE_MARKER in text or not text.strip()):
            fault = f"holds {IMAGE_MARKER}" if IMAGE_MARKER in text else "is empty or only whitespace"
            raise DataError(f"turn {number}, an answer, {fault}; correct it or drop the row")
    texts: list = [text for _, text in turns]
    if len(texts) % 2:
        if require_answers:
            raise DataError("the last question has no answer; add it (only prediction takes rows without)")
        texts.append(None)
    return list(zip(texts[::2], texts[1::2], strict=True))


def _place_markers(turns: list[tuple[str, str | None]], num_images: int) -> list[tuple[str, str | None]]:
    """The turns with one marker per image, as told at the top of this module."""
    found = sum(question.count(IMAGE_MARKER) for question, _ in turns)
    if found == 0:
        turns = [(IMAGE_MARKER * num_images + turns[0][0].strip(), turns[0][1]), *turns[1:]]
    elif found != num_images:
        raise DataError(
            f"found {found} {IMAGE_MARKER} for {num_images} image(s); wanted one {IMAGE_MARKER} each, or none"
        )
    placed = [(_tidy(question, found == 1), answer) for question, answer in turns]
    if not all(question for question, _ in placed):
        raise DataError("a question is empty; write one or drop the row")
    return placed


def _tidy(question: str, single: bool) -> str:
    parts = question.split(IMAGE_MARKER)
    filled = [number for number, part in enumerate(parts) if part.strip()]
    if not filled:
        return IMAGE_MARKER * (len(parts) - 1)
    front, back = filled[0], len(parts) - 1 - filled[-1]
    text = IMAGE_MARKER.join(parts[filled[0] : filled[-1] + 1]).strip()
    return (
        IMAGE_MARKER * (front + back) + text if single else IMAGE_MARKER * front + text + IMAGE_MARKER * back
    )


def _people(answers: Any) -> list[str]:
    """The texts of `answers`: several people's answers, as texts or as VQA v2 has them, {answer, ...}."""
    texts = [item.get("answer") if isinstance(item, dict) else item for item in _list(answers, "answers")]
    texts = [_text(text, "answers") for text in texts]
    if not all(text.strip() for text in texts):
        raise DataError(f"answers holds an empty text: {_short(texts)}; drop it or write the answer")
    return texts


def _most_frequent(texts: list[str]) -> str:
    """Of equally frequent ones the first; outer whitespace does not matter."""
    trimmed = [text.strip() for text in texts]
    return texts[trimmed.index(Counter(trimmed).most_common(1)[0][0])]


def _starting_with(answer: str, references: list[str]) -> list[str]:
    """The references with the answer, or what equals it but for outer whitespace, moved or added to the front."""
    same = [number for number, text in enumerate(references) if text.strip() == answer.strip()][:1]
    return [answer, *(text for number, text in enumerate(references) if number not in same)]


def _choices(value: Any, answer: str | None) -> list[str]:
    """The choices as they are; compared without outer whitespace."""
    choices = [_text(choice, "choices") for choice in _list(value, "choices")]
    trimmed = [choice.strip() for choice in choices]
    if len(choices) < 2:
        raise DataError(f"choices are {choices}; wanted two or more, or leave the key out")
    if "" in trimmed:
        raise DataError(f"choice {trimmed.index('') + 1} of {choices} is empty; write it or drop it")
    if twice := [choice for choice, count in Counter(trimmed).items() if count > 1]:
        raise DataError(f"the choice {twice[0]!r} is given twice in {choices}; drop one of them")
    if answer is not None and answer.strip() not in trimmed:
        raise DataError(f"the answer {answer!r} is not among the choices {choices}; add it or correct one")
    return choices


def _image(image: Any, root: ImageRoot) -> str | bytes:
    """The absolute path or the bytes behind a name, {bytes, path} (parquet) or {url} (message part)."""
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path") or image.get("url")
    if isinstance(image, bytes) and image:
        return image
    if isinstance(image, str):
        return root.resolve(image)
    raise DataError(f"found the image {_short(image)}; wanted a file name, or bytes that are not empty")


def _id(value: Any) -> str:
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else _text(value, "id")
    if not text.strip():
        raise DataError("the id is empty; write one, or leave the key out")
    return text


def _list(value: Any, name: str) -> list:
    if not isinstance(value, list) or not value:
        raise DataError(f"{name} is {_short(value)}; wanted a list that is not empty")
    return value


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name} is {_short(value)}; wanted text")
    try:
        if not value.isascii():
            value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{name} holds a lone surrogate at character {error.start}; repair it") from None
    return value


def _short(value: Any) -> str:
    return f"{type(value).__name__} {value!r:.80}"

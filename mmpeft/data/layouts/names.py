"""Names of keys: under which a meaning stands in the layouts of public tools and data sets. Case, ``_`` and ``-`` do
not matter: ``Image ID``, ``imageId`` and ``image_id`` are one name."""

import difflib
import re
from functools import lru_cache
from typing import NamedTuple

from mmpeft.data.key_names import plain as plain

NAMES: dict[str, tuple[str, ...]] = {
    "id": ("id",),
    "question id": ("question_id", "qid", "sample_id", "row_id", "uid", "uuid"),
    "task": ("task",),
    "image": (
        *("image", "images", "file_name", "file_names", "filename", "filenames", "image_file_name"),
        *("image_filename", "image_name", "image_names", "img_name", "imgname", "image_path", "image_paths"),
        *("img_path", "image_file", "image_files", "img_file", "img", "imgs", "figure_path", "image_base64"),
        *("image_base64_str", "image_bytes", "image_url", "image_urls", "image_local_name"),
    ),
    "path": ("path", "file", "file_path", "filepath", "name"),
    "image id": ("image_id", "img_id"),
    "video": ("video", "videos", "video_path", "video_paths", "video_file", "video_name", "video_url"),
    "frames": ("frames", "num_frames"),
    "audio": ("audio", "audios", "audio_path", "audio_paths", "audio_file", "speech"),
    "conversations": (
        *("conversations", "conversation", "messages", "dialogue", "dialog", "texts"),
        "conversatons",  # as LLaVA-Med is published
    ),
    "system": ("system", "system_prompt", "system_message"),
    "history": ("history",),
    "question": ("question", "query", "prompt", "instruction", "prefix", "problem"),
    "input": ("input", "inputs"),
    "context": ("context", "hint"),
    "answer": (
        *("answer", "response", "output", "outputs", "completion", "suffix", "solution"),
        "multiple_choice_answer",
    ),
    "answers": ("answers",),
    "choices": ("choices", "options"),
    "right choice": (
        *("answer_index", "answer_idx", "correct_choice_idx", "correct_idx", "correct_index", "answer_label"),
        *("answer_key", "answer_letter"),
    ),
    "caption": ("caption", "captions", "sentences", "report", "description", "findings"),
    "text": ("text",),
    "label": ("label", "class", "class_name"),
    "kto tag": ("kto_tag",),
    "chosen": ("chosen", "chosen_response"),
    "rejected": ("rejected", "rejected_response", "rejected_responses", "rejected_messages"),
    "tools": ("tools", "functions"),
}
"""Meaning -> its names, our own first."""

NUMBERED = re.compile(r"(?:image|img)_?(\d+)", re.I)
"""Several images, each under a key of its own."""
SIDES = {"leftimage": 1, "rightimage": 2}
"""Two images beside each other."""
LETTERED = re.compile(r"(?:choice|option)?[ _]?([a-j])", re.I)
"""Choices, each under a key of its own."""

QUESTIONS = frozenset({"questions", "qas", "qa", "qapairs"})
"""Lists of the questions of a row: OCR-VQA, Visual Genome, TallyQA, PixMo-docs."""


def plain_names(text: str) -> frozenset[str]:
    """The names in a text, separated by spaces."""
    return frozenset(map(plain, text.split()))


MEANINGS = {plain(name): meaning for meaning, names in NAMES.items() for name in names}
KNOWN = [name for names in NAMES.values() for name in names]


class Keys(NamedTuple):
    """The keys of one row by what they mean."""

    names: frozenset[str]
    """All of them, plain."""
    meant: dict[str, tuple[str, ...]]
    """Meaning -> keys."""
    numbered: tuple[str, ...]
    """``image_1``, ``image_2``, ... in their order."""
    lettered: tuple[str, ...]
    """``A``, ``B``, ... in their order."""
    gapped: tuple[str, ...]
    """The same where one of them is missing or given twice."""
    questions: tuple[str, ...]
    """Lists of questions."""


@lru_cache(1000)
def sort_keys(keys: tuple[str, ...]) -> Keys:
    """Rows of a file mostly have the same."""
    meant: dict[str, tuple[str, ...]] = {}
    for key in keys:
        if meaning := MEANINGS.get(plain(key)):
            meant[meaning] = (*meant.get(meaning, ()), key)
    numbers = {key: int(found[1]) for key in keys if (found := NUMBERED.fullmatch(key))}
    numbers |= {key: SIDES[plain(key)] for key in keys if plain(key) in SIDES}
    letters = {key: found[1].lower() for key in keys if (found := LETTERED.fullmatch(key))}
    choices = sorted(letters, key=lambda key: letters[key])
    whole = "".join(letters[key] for key in choices) == "abcdefghij"[: len(choices)] and len(choices) > 1
    names = frozenset(map(plain, keys))
    numbered = tuple(sorted(numbers, key=lambda key: numbers[key]))
    several = tuple(key for key in keys if plain(key) in QUESTIONS)
    are_named = any(len(key) > 1 or key.isupper() for key in choices)  # VideoChat2's i, q and a are none
    gapped = tuple(choices) if len(choices) > 1 and are_named and not whole else ()
    return Keys(names, meant, numbered, tuple(choices) if whole else (), gapped, several)


def closest(key: str) -> str | None:
    """The known key that is spelt most like it."""
    near = difflib.get_close_matches(plain(key), MEANINGS, n=1, cutoff=0.6)
    return next((name for name in KNOWN if near and plain(name) == near[0]), None)


def is_known(key: str) -> bool:
    return (
        plain(key) in MEANINGS
        or plain(key) in SIDES
        or bool(NUMBERED.fullmatch(key) or LETTERED.fullmatch(key))
    )

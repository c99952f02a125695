"""Documents of public data sets: what the keys of their rows mean.

Of each it is listed which keys tell it, what others are called here, and which say nothing that changes a sample. Keys
that are not listed stay, so that the reader of rows refuses what it does not know.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mmpeft.data.formats.base import DataError


@dataclass(frozen=True)
class PublicDocument:
    name: str
    tell: frozenset[str]
    """Keys that all of its rows have, and no row of another."""
    names: dict[str, str] = field(default_factory=dict)
    """Its keys -> ours."""
    further: frozenset[str] = frozenset()
    """Keys that change no sample."""
    unroll: Callable[[dict], list[Any]] | None = None
    """Its row, with our names -> our rows."""


def as_rows(row: Any) -> list[Any]:
    """What a row of a document means in our names; one that no public document has stays as it is."""
    known = next((one for one in DOCUMENTS if isinstance(row, dict) and one.tell <= row.keys()), None)
    if known is None or not isinstance(row, dict):
        return [row]
    made: dict[str, Any] = {}
    for key, value in row.items():
        name = str(known.names.get(key, key))
        if key in known.further and key not in known.names:
            continue
        if name in made and value is not None and made[name] is not None and name != "id":
            return [DataError(f"both {key!r} and another key are its {name}; keep one of them")]
        is_number = name == "image" and isinstance(value, int)  # `ImageRoot` knows which file is meant
        made[name] = str(value) if is_number else value
    return known.unroll(made) if known.unroll else [made]


def _sentences(row: dict) -> list[dict]:
    """Karpathy's splits: a row for each sentence, whose references are all of them."""
    sentences = row.pop("sentences")
    texts = [sentence.get("raw") if isinstance(sentence, dict) else sentence for sentence in sentences]
    if folder := row.pop("filepath", None):
        row["image"] = f"{folder}/{row['image']}"
    name = row.pop("id", row["image"])
    return [
        row | {"id": f"{name}-{number}", "text": text, "answers": texts}
        for number, text in enumerate(texts, 1)
    ]


def _science(row: dict) -> list[Any]:
    """ScienceQA: its answer is the place of the right choice, its hint belongs to the question."""
    if isinstance(answer := row.get("answer"), int):
        if not 0 <= answer < len(row["choices"]):
            return [DataError(f"the answer is choice {answer} of {len(row['choices'])}, counted from 0")]
        row["answer"] = row["choices"][answer]
    if hint := row.pop("hint"):
        row["question"] = f"{hint}\n{row['question']}"
    if row.get("image") and "split" in row:
        row["image"] = f"{row['split']}/{row['id']}/{row['image']}"
    return [row]


VQA = {"question_id": "id", "image_id": "image", "multiple_choice_answer": "answer"}
DOCUMENTS = (
    PublicDocument(
        "Karpathy's splits",
        frozenset({"filename", "sentences"}),
        {"filename": "image", "imgid": "id"},
        frozenset({"sentids", "cocoid"}),
        _sentences,
    ),
    PublicDocument(
        "TextVQA",
        frozenset({"image_id", "question_id", "question", "question_tokens"}),
        VQA,
        frozenset(
            {"question_tokens", "image_classes", "image_width", "image_height"}
            | {"flickr_original_url", "flickr_300k_url"}
        ),
    ),
    PublicDocument(
        "VQA v2 and OK-VQA",
        frozenset({"question_id", "image_id", "question"}),
        VQA,
        frozenset({"question_type", "answer_type", "confidence"}),
    ),
    PublicDocument(
        "DocVQA",
        frozenset({"questionId", "question", "docId"}),
        {"questionId": "id"},
        frozenset({"docId", "question_types", "ucsf_document_id", "ucsf_document_page_no"}),
    ),
    PublicDocument(
        "GQA",
        frozenset({"imageId", "question"}),
        {"imageId": "image"},
        frozenset({"semantic", "semanticStr", "types", "groups", "annotations", "isBalanced"})
        | {"equivalent", "entailed", "fullAnswer"},
    ),
    PublicDocument(
        "R2Gen",
        frozenset({"report", "image_path"}),
        {"image_path": "images", "report": "text"},
        frozenset({"study_id", "subject_id"}),
    ),
    PublicDocument(
        "ScienceQA",
        frozenset({"question", "choices", "hint", "lecture", "solution"}),
        {},
        frozenset({"lecture", "solution", "task", "grade", "subject", "topic", "category", "skill"}),
        _science,
    ),
    PublicDocument("COCO captions", frozenset({"file_name", "caption"}), {"caption": "text"}),
    PublicDocument(
        "COCO captions without images",
        frozenset({"image_id", "caption"}),
        {"image_id": "image", "caption": "text"},
    ),
)

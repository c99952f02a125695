"""Documents of sets of questions beside those of `formats_documents.py`."""

from typing import Any

from tests.data.layouts.layout import Layout
from tests.data.layouts.rows import A, B, meant
from tests.data.layouts.writing import document, images


def held(name: str, value: Any, *records: dict[str, Any], refused: str | None = None, **told: Any) -> Layout:
    """A document beside images."""

    def write(folder):
        images(folder, *told.get("files", (A, B)))
        return document(folder, "d.json", value)

    return Layout(name, write, list(records) or None, refused)


LAYOUTS = [
    held(
        "CLEVR questions",
        {
            "info": {"split": "train"},
            "questions": [
                {
                    "image_index": 0,
                    "program": [{"inputs": [], "function": "scene"}],
                    "question_index": 0,
                    "image_filename": A,
                    "question_family_index": 1,
                    "split": "train",
                    "answer": "a cat",
                    "question": "What is it?",
                }
            ],
        },
        meant("What is it?", "a cat"),
    ),
    held(
        "PlotQA, question_string",
        {"qa_pairs": [{"image_index": 1, "question_string": "What?", "question_id": 0, "answer": "3"}]},
        refused="found the keys ['answer', 'image_index', 'question_id', 'question_string']",
    ),
    held(
        "COCO-Text, annotations by their ids",
        {
            "anns": {
                str(number): {"bbox": [1, 2, 3, 4], "utf8_string": "x", "id": number} for number in range(30)
            }
        },
        refused="and 11 more",
    ),
    held(
        "SEED-Bench, the names of its types beside the questions",
        {"questions": [{"question": "What?", "answer": "A"}], "question_type": {"x": 1}},
        refused="found ['question_type'] beside the lists ['questions']",
    ),
    held(
        "InternVL meta.json",
        {"own": {"root": "images/", "annotation": "own.jsonl", "repeat_time": 1, "length": 9}},
        refused="tells of a data file; name that, 'own.jsonl'",
    ),
    held(
        "VQA-X, an explanation beside each",
        {
            "9": {
                "answers": [{"answer": "cat"}] * 3,
                "question": "What?",
                "image_name": A,
                "explanation": ["it purrs"],
            }
        },
        refused="the key 'explanation'",
    ),
]

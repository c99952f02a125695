"""Rows that are refused: what is proposed for them helps."""

from tests.data.layouts.rows import A, refused, said

ASKED = {"image": A, "question": "What is it?", "answer": "a cat"}
BESIDE = "not read beside the row's other keys; leave it out"

LAYOUTS = [
    *(
        refused(
            f"Conversations beside {key}",
            {"image": A, "conversations": said("What?", "A cat."), key: "z"},
            BESIDE,
        )
        for key in ("question", "answer", "caption")
    ),
    refused(
        "chosen, rejected and answer",
        {"image": A, "question": "What?", "chosen": "a cat", "rejected": "a dog", "answer": "z"},
        BESIDE,
    ),
    refused(
        "Choices A, B, D without C",
        {**ASKED, "A": "a cat", "B": "x", "C": None, "D": "y"},
        "none missing or empty",
    ),
    refused("A number spelt like a known list", {**ASKED, "rotation": 90}, "data.columns: {KEY: rotation}"),
    refused(
        "{image, label: true}", {"image": A, "label": True}, "label is bool True, a number without its name"
    ),
]

"""Sets of questions as they are published since 2024: on the hub, as documents, and as lists of questions a row."""

from typing import Any

from tests.data.layouts.layout import Layout
from tests.data.layouts.rows import A, B, chat, meant, read, refused
from tests.data.layouts.writing import parquet, png

IMAGE = {"bytes": png(), "path": "x.png"}
OTHER = {"bytes": png("blue"), "path": "y.png"}
ONE = meant("What is it?", "a cat", images=(png(),))
PICKED = {**ONE, "choices": ["a dog", "a cat"]}
ASKED = {"image": IMAGE, "question": "What is it?"}
TWO = (meant("What is it?", "A cat."), meant("Old?", "Yes."))
MMMU = {
    "id": "validation_Art_1",
    "question": "<image 1> What is it?",
    "options": "['a dog', 'a cat']",
    "explanation": "It purrs.",
    "image_1": IMAGE,
    "image_2": None,
    "img_type": "['Photographs']",
    "answer": "B",
    "topic_difficulty": "Easy",
    "question_type": "multiple-choice",
    "subfield": "Drawing",
}


def hub(
    name: str, row: dict, *records: dict[str, Any], refused: str | None = None, **settings: Any
) -> Layout:
    """A row of parquet as the hub has it."""
    return Layout(
        name, lambda f: parquet(f, "d.parquet", row), list(records) or None, refused, settings=settings
    )


LAYOUTS = [
    hub("MMMU, options as Python prints them", MMMU, PICKED),
    hub("MMMU, an open question", MMMU | {"options": "[]", "answer": "a cat"}, ONE),
    hub(
        "MMMU-Pro, options with apostrophes",
        MMMU | {"options": "['a dog', \"a cat's\"]"},
        {**PICKED, "turns": [("<image>What is it?", "a cat's")], "choices": ["a dog", "a cat's"]},
    ),
    hub(
        "MMMU, several right answers as Python prints them",
        MMMU | {"options": "[]", "answer": "['1/2', '0.5']"},
        refused="a list as Python prints it",
    ),
    hub(
        "MathVista, a decoded_image beside its path",
        {
            **ASKED,
            "pid": "1",
            "image": "images/1.jpg",
            "decoded_image": IMAGE,
            "choices": ["a dog", "a cat"],
            "unit": None,
            "precision": 1.0,
            "answer": "a cat",
            "question_type": "multi_choice",
            "answer_type": "text",
            "metadata": {"grade": "daily life"},
            "query": "Hint: choose. What is it?",
        },
        PICKED,
    ),
    hub(
        "AI2D, the index of a choice as text", {**ASKED, "options": ["a dog", "a cat"], "answer": "1"}, PICKED
    ),
    hub(
        "An index as text beyond the choices",
        {**ASKED, "options": ["a dog", "a cat"], "answer": "2"},
        refused="counted from 0 to 1",
    ),
    hub(
        "An answer by letter and text",
        {**ASKED, "choices": ["a dog", "a cat"], "answer": "(B) a cat"},
        PICKED,
    ),
    hub(
        "An answer by the letter of another text",
        {**ASKED, "choices": ["a dog", "a cat"], "answer": "A. a cat"},
        refused="the answer 'A. a cat' is not among the choices",
    ),
    hub(
        "BLINK, a question and its prompt",
        {
            "idx": "1",
            **ASKED,
            "sub_task": "x",
            "choices": ["a dog", "a cat"],
            "answer": "(B)",
            "prompt": "Choose.",
        },
        refused="each of ['question', 'prompt'] may be the question",
    ),
    hub(
        "BLINK, its prompt left out",
        {
            "idx": "1",
            "image_1": IMAGE,
            "image_2": None,
            "question": "What is it?",
            "choices": ["a dog", "a cat"],
            "answer": "(B)",
            "prompt": "Choose.",
            "explanation": None,
        },
        PICKED,
        ignore=["prompt"],
    ),
    hub(
        "NLVR2, left_image and right_image",
        {"question_id": "1", "left_image": IMAGE, "right_image": OTHER, "question": "Same?", "answer": "no"},
        meant("Same?", "no", images=(png(), png("blue"))),
    ),
    hub(
        "POPE on the hub, image_source",
        {
            "id": "0",
            "question_id": "1",
            **ASKED,
            "answer": "a cat",
            "image_source": "COCO_val2014_1",
            "category": "popular",
        },
        ONE,
    ),
    read(
        "POPE, {question_id, image, text, label}",
        {"question_id": 1, "image": A, "text": "Is it a cat?", "label": "yes"},
        meant("Is it a cat?", "yes"),
    ),
    hub(
        "PixMo-docs, questions as lists side by side",
        {
            "image": IMAGE,
            "image_id": "a",
            "questions": {"question": ["What is it?", "Old?"], "answer": ["a cat", "Yes."]},
        },
        ONE,
        meant("Old?", "Yes.", images=(png(),)),
    ),
    read(
        "OCR-VQA, questions and answers",
        {
            "image": A,
            "questions": ["What is it?", "Old?"],
            "answers": ["A cat.", "Yes."],
            "image_id": "7",
            "set_name": "train",
        },
        *TWO,
    ),
    refused(
        "OCR-VQA, what is known of the book",
        {"image": A, "questions": ["What is it?"], "answers": ["A book."], "title": "Cats", "genre": "Art"},
        "the key 'title'",
    ),
    refused(
        "More questions than answers",
        {"image": A, "questions": ["What is it?", "Old?"], "answers": ["A cat."]},
        "found {'question': 2, 'answer': 1} entries",
    ),
    read(
        "Visual Genome question_answers.json",
        {
            "id": 1,
            "qas": [
                {
                    "a_objects": [],
                    "question": question,
                    "image_id": 1,
                    "qa_id": number,
                    "answer": answer,
                    "q_objects": [{"object_id": 3}],
                }
                for number, (question, answer) in enumerate([("What is it?", "A cat."), ("Old?", "Yes.")])
            ],
        },
        *({**record, "images": ["1.jpg"], "id": own} for record, own in zip(TWO, ("1", "1#2"), strict=True)),
        file="d.json",
        files=("1.jpg",),
    ),
    refused(
        "Visual Genome region_descriptions.json",
        {"id": 1, "regions": [{"region_id": 1, "phrase": "a cat"}]},
        "found the keys ['id', 'regions']",
    ),
    hub(
        "TallyQA, a list under qa",
        {
            "image": IMAGE,
            "qa": [{"question": "What is it?", "answer": "a cat", "is_simple": True, "data_source": "x"}],
        },
        ONE,
    ),
    refused(
        "An entry about another image than its row",
        {"image": A, "qa": [{"question": "What is it?", "answer": "A cat.", "image": B}]},
        "an entry of qa has another 'image'",
    ),
    read(
        "InfographicVQA, image_local_name beside its address",
        {
            "questionId": 1,
            "question": "What is it?",
            "image_local_name": A,
            "image_url": "https://example.org/1.png",
            "ocr_output_file": "1.json",
            "answers": ["a cat"],
            "data_split": "val",
        },
        {**meant("What is it?", "a cat"), "references": ["a cat"]},
    ),
    refused(
        "HallusionBench, gt_answer",
        {"question": "Is it?", "filename": A, "gt_answer": "1", "figure_id": "1"},
        "the key 'gt_answer'",
    ),
    hub(
        "RefCOCO on the hub, several expressions under answer",
        {**ASKED, "answer": ["a cat", "the cat"], "bbox": [1.0]},
        refused="say so (data.columns: {answers: answer})",
    ),
    read(
        "ms-swift GRPO, a solution",
        {"messages": chat("<image>What is it?"), "images": [A], "solution": "a cat"},
        meant("What is it?", "a cat"),
    ),
    hub(
        "ms-swift, images as bytes", {"messages": chat("<image>What is it?", "a cat"), "images": [IMAGE]}, ONE
    ),
    hub(
        "Geometry3K, {images, problem, answer}",
        {"images": [IMAGE], "problem": "<image>What is it?", "answer": "a cat"},
        ONE,
    ),
    hub(
        "open-r1 multimodal, the original question",
        {**ASKED, "answer": "a cat", "original_question": "What?"},
        refused="the key 'original_question'",
    ),
    refused(
        "VLFeedback, completions of several models",
        {"image": A, "prompt": "What?", "models": ["a"], "completions": [{"model": "a"}]},
        "the key 'models'",
    ),
    refused(
        "Gemini tuning, contents of parts",
        {"contents": [{"role": "user", "parts": [{"text": "What?"}]}]},
        "found the keys ['contents']",
    ),
    refused(
        "Bedrock, an image of S3",
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"text": "What?"}, {"image": {"format": "png", "source": {"uri": "s3://x"}}}],
                },
                {"role": "assistant", "content": [{"text": "A cat."}]},
            ]
        },
        "found the image dict {'format': 'png'",
    ),
]

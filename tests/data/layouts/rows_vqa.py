"""Questions about images, documents and scans, with one answer or those of several people."""

from tests.data.layouts.rows import A, meant, read, refused

ONE = meant("What is it?", "a cat")
PEOPLE = [
    {"answer": text, "answer_id": n, "answer_confidence": "yes"}
    for n, text in enumerate(["a cat", "cat", "cat"])
]
SEVERAL = {**meant("What is it?", "cat"), "references": ["cat", "a cat", "cat"]}
ASKED = {"image": A, "question": "What is it?"}

LAYOUTS = [
    read(
        "LLaVA-Med VQA eval, text with <image>",
        {"question_id": 3, "image": A, "text": "<image>\nWhat is it?", "answer": "a cat"},
        ONE,
    ),
    read(
        "VQAv2 joined with its file of annotations",
        {
            "question_type": "what is",
            "multiple_choice_answer": "cat",
            "answers": PEOPLE,
            "image_id": 262148,
            "answer_type": "other",
            "question_id": 262148000,
            "question": "What is it?",
            "image": A,
        },
        SEVERAL,
    ),
    read(
        "VQAv2 joined, an image id with its file beside it",
        {"answers": PEOPLE, "image_id": 262148, "question_id": 1, "question": "What is it?"},
        {**SEVERAL, "images": ["262148.jpg"]},
        files=("262148.jpg",),
    ),
    refused(
        "VQAv2 joined, an image id without a file",
        {"answers": PEOPLE, "image_id": 262148, "question_id": 1, "question": "What is it?"},
        "the key 'image_id'",
    ),
    read(
        "VQAv2 on the hub, multiple_choice_answer",
        {
            **ASKED,
            "question_id": 9,
            "multiple_choice_answer": "a cat",
            "question_type": "what is",
            "answer_type": "other",
        },
        ONE,
    ),
    read(
        "BLIP and ALBEF, a list of answers, in data.columns",
        {"question_id": 1, **ASKED, "answer": ["a cat", "cat", "cat"], "dataset": "vqa"},
        SEVERAL,
        columns={"answers": "answer"},
    ),
    refused(
        "BLIP and ALBEF, a list of answers",
        {"question_id": 1, **ASKED, "answer": ["a cat", "cat", "cat"], "dataset": "vqa"},
        "say so (data.columns: {answers: answer})",
    ),
    read(
        "Answers of people, a column a field",
        {**ASKED, "answers": {"answer": ["a cat", "cat", "cat"], "answer_id": [1, 2, 3]}},
        SEVERAL,
    ),
    refused(
        "A text beside answers of which it is none",
        {"image": A, "text": "What is it?", "answers": ["a cat", "cat"]},
        "found the keys ['answers', 'image', 'text']",
    ),
    read(
        "VizWiz, answerable", {**ASKED, "answers": PEOPLE, "answer_type": "other", "answerable": 1}, SEVERAL
    ),
    read(
        "Answers of people, some empty",
        {**ASKED, "answers": ["", "a cat", " "]},
        {**ONE, "references": ["a cat"]},
    ),
    refused("Answers of people, all empty", {**ASKED, "answers": ["", " "]}, "answers holds no text"),
    read(
        "Answers of nobody, to predict",
        {**ASKED, "answers": []},
        meant("What is it?", None),
        require_answers=False,
    ),
    read(
        "VQA-RAD, image_name",
        {
            "qid": 1,
            "phrase_type": "freeform",
            "qid_linked_id": "x",
            "image_case_url": "https://example.org/1",
            "image_name": A,
            "image_organ": "HEAD",
            "evaluation": "evaluated",
            "question": "What is it?",
            "question_rephrase": "Which is it?",
            "question_relation": "NULL",
            "question_frame": "NULL",
            "question_type": "PRES",
            "answer": "a cat",
            "answer_type": "OPEN",
        },
        ONE,
    ),
    read(
        "VQA-RAD, an answer that is a number",
        {
            "qid": 1,
            "phrase_type": "freeform",
            "image_name": A,
            "image_organ": "HEAD",
            "question": "How many?",
            "answer": 3,
        },
        meant("How many?", "3"),
    ),
    read(
        "SLAKE, img_name",
        {
            "img_id": 1,
            "img_name": A,
            "question": "What is it?",
            "answer": "a cat",
            "q_lang": "en",
            "location": "Abdomen",
            "modality": "MRI",
            "answer_type": "OPEN",
            "base_type": "vqa",
            "content_type": "Modality",
            "triple": ["vhead", "_", "_"],
            "qid": 0,
        },
        ONE,
    ),
    read(
        "PathVQA, an image name without its ending",
        {"image": "train_0422", "question": "What is it?", "answer": "a cat"},
        {**ONE, "images": ["train_0422.jpg"]},
        files=("train_0422.jpg",),
    ),
    refused(
        "An image name without its ending, of two files",
        {**ASKED, "image": "x", "answer": "a cat"},
        "may be any of ['x.jpg', 'x.png']",
        files=("x.jpg", "x.png"),
    ),
    read("ChartQA, {imgname, query, label}", {"imgname": A, "query": "What is it?", "label": "a cat"}, ONE),
    read(
        "ChartQA on the hub, a list of one label",
        {"image": A, "query": "What is it?", "label": ["a cat"], "human_or_machine": 0},
        ONE,
    ),
    read(
        "TextVQA, image_id with its file",
        {
            "question": "What is it?",
            "image_id": "a",
            "image_classes": ["Cat"],
            "flickr_original_url": "https://example.org/a.jpg",
            "flickr_300k_url": "https://example.org/b.jpg",
            "image_width": 2,
            "image_height": 2,
            "answers": ["a cat", "cat", "cat"],
            "question_tokens": ["what"],
            "question_id": 3,
            "set_name": "train",
        },
        SEVERAL,
    ),
    read(
        "DocVQA, row by row",
        {
            "questionId": 3,
            "question": "What is it?",
            "question_types": ["form"],
            "image": A,
            "docId": 1,
            "ucsf_document_id": "x",
            "ucsf_document_page_no": "1",
            "answers": ["cat", "a cat", "cat"],
            "data_split": "train",
        },
        SEVERAL,
    ),
    read(
        "GQA, imageId with its file",
        {
            "semantic": [],
            "entailed": [],
            "equivalent": [],
            "question": "What is it?",
            "imageId": "a",
            "isBalanced": True,
            "groups": {},
            "answer": "a cat",
            "semanticStr": "",
            "annotations": {},
            "types": {"detailed": "cat"},
            "fullAnswer": "It is a cat.",
        },
        ONE,
    ),
    read(
        "OK-VQA, {raw_answer, answer}",
        {
            **ASKED,
            "question_id": 3,
            "answers": [
                {"raw_answer": "cats", "answer": "cat", "answer_id": 1},
                {"raw_answer": "a cat", "answer": "a cat", "answer_id": 2},
                {"answer": "cat"},
            ],
            "answer_type": "other",
            "question_type": "one",
            "confidence": 3,
        },
        SEVERAL,
    ),
    read(
        "SQuAD, answers of texts and places",
        {
            "id": "x",
            "context": "It purrs.",
            "question": "What is it?",
            "answers": {"text": ["a cat"], "answer_start": [0]},
        },
        {**meant("It purrs.\nWhat is it?", "a cat", images=()), "references": ["a cat"]},
    ),
]

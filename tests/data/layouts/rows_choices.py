"""Multiple choice and classes: the right one by text, letter or index."""

import base64

from tests.data.layouts.rows import CLASS, A, B, meant, read, refused
from tests.data.layouts.writing import png

ONE, PLAIN = meant("What is it?", "a cat"), meant("What is it?", "a cat", images=())
PICKED = {**ONE, "choices": ["a dog", "a cat"]}
ASKED = {"image": A, "question": "What is it?"}
LONG = base64.b64encode(png() + bytes(2000)).decode()

LAYOUTS = [
    read(
        "PMC-VQA, Figure_path and a column a choice",
        {
            "Figure_path": A,
            "Question": "What is it?",
            "Answer": "a cat",
            "Choice A": "A: a dog",
            "Choice B": "B: a cat",
            "Answer_label": "B",
        },
        PICKED,
    ),
    read(
        "PMC-VQA 2, the answer is a letter",
        {
            "index": 0,
            "Figure_path": A,
            "Question": "What is it?",
            "Choice A": " A:a dog",
            "Choice B": " B:a cat",
            "Answer": "B",
            "split": "train",
        },
        PICKED,
    ),
    refused(
        "PMC-VQA 2, the figure's caption",
        {
            "Figure_path": A,
            "Caption": "Two cats.",
            "Question": "What is it?",
            "Choice A": "a dog",
            "Choice B": "a cat",
            "Answer": "B",
        },
        "the key 'Caption'",
    ),
    read(
        "PMC-VQA 2, its caption left out",
        {
            "Figure_path": A,
            "Caption": "Two cats.",
            "Question": "What is it?",
            "Choice A": "a dog",
            "Choice B": "a cat",
            "Answer": "B",
        },
        PICKED,
        ignore=["Caption"],
    ),
    refused(
        "PMC-VQA, letter and answer differ",
        {
            "Figure_path": A,
            "Question": "What is it?",
            "Answer": "a cat",
            "Choice A": "a dog",
            "Choice B": "a cat",
            "Answer_label": "A",
        },
        "Answer_label names the choice 'a dog'",
    ),
    read(
        "ScienceQA on the hub, the answer is an index",
        {
            **ASKED,
            "choices": ["a dog", "a cat"],
            "answer": 1,
            "hint": "It purrs.",
            "task": "closed choice",
            "grade": "grade2",
            "subject": "natural science",
            "topic": "biology",
            "category": "animals",
            "skill": "Name animals",
            "lecture": "Animals ...",
            "solution": "It purrs.",
        },
        {**PICKED, "turns": [("<image>It purrs.\nWhat is it?", "a cat")]},
    ),
    read(
        "A-OKVQA, correct_choice_idx",
        {**ASKED, "question_id": "x", "choices": ["a dog", "a cat"], "correct_choice_idx": 1},
        PICKED,
    ),
    refused(
        "A-OKVQA, its direct answers and rationales",
        {
            **ASKED,
            "question_id": "x",
            "choices": ["a dog", "a cat"],
            "correct_choice_idx": 1,
            "direct_answers": ["cat"],
            "rationales": ["It purrs."],
        },
        "the key 'direct_answers'",
    ),
    read(
        "MMBench, a column A, B, ... a choice",
        {
            "index": 1,
            "question": "What is it?",
            "hint": None,
            "A": "a dog",
            "B": "a cat",
            "C": None,
            "D": None,
            "answer": "B",
            "category": "animal",
            "l2-category": "kind",
            "image": LONG,
            "split": "dev",
        },
        {**PICKED, "images": [base64.b64decode(LONG)]},
    ),
    read(
        "SEED-Bench, choice_a, ...",
        {"question_id": "1", **ASKED, "choice_a": "a dog", "choice_b": "a cat", "answer": "B"},
        PICKED,
    ),
    read(
        "MMMU-like, options and a letter",
        {
            "id": "x1",
            "question": "<image 1> What is it?",
            "options": ["a dog", "a cat"],
            "answer": "B",
            "image_1": A,
            "image_2": None,
        },
        PICKED,
    ),
    read(
        "MMMU-like, two numbered images",
        {"id": "x1", "question": "Is <image 1> like <image 2>?", "answer": "no", "image_1": A, "image_2": B},
        meant("Is <image> like <image>?", "no", images=(A, B)),
    ),
    refused(
        "MMMU-like, numbers out of order",
        {"id": "x1", "question": "Is <image 2> like <image 1>?", "answer": "no", "image_1": A, "image_2": B},
        "wanted every image once and in order",
    ),
    read(
        "ARC, choices of texts and labels",
        {
            "id": "x",
            "question": "What is it?",
            "choices": {"text": ["a dog", "a cat"], "label": ["A", "B"]},
            "answerKey": "B",
        },
        {**PLAIN, "choices": ["a dog", "a cat"]},
    ),
    read(
        "MedQA, options by letter",
        {
            "question": "What is it?",
            "options": {"A": "a dog", "B": "a cat"},
            "answer": "a cat",
            "answer_idx": "B",
        },
        {**PLAIN, "choices": ["a dog", "a cat"]},
    ),
    read(
        "A letter that is also a choice of a plain list",
        {**ASKED, "choices": ["B", "A"], "answer": "A"},
        meant("What is it?", "A", choices=["B", "A"]),
    ),
    refused(
        "A letter that is another choice's text",
        {**ASKED, "A": "B", "B": "A", "answer": "A"},
        "one of the choices ['B', 'A'] and the letter of another",
    ),
    refused(
        "Several right choices under answer",
        {**ASKED, "choices": ["a dog", "a cat", "a pet"], "answer": ["a cat", "a pet"]},
        "answer is list ['a cat', 'a pet'], 2 answers",
    ),
    refused(
        "Several right choices under answers",
        {**ASKED, "choices": ["a dog", "a cat", "a pet"], "answers": ["a cat", "a pet"]},
        "several of the choices",
    ),
    refused(
        "An index beyond the choices",
        {**ASKED, "choices": ["a dog", "a cat"], "answer": 2},
        "counted from 0 to 1",
    ),
    refused(
        "An index that is also a choice",
        {**ASKED, "choices": ["1", "2", "3"], "answer": 1},
        "one of the choices ['1', '2', '3'] and the place of another",
    ),
    read("Classes by name, {image, label}", {"image": A, "label": "cat"}, meant(CLASS, "cat")),
    read(
        "Classes by name with choices",
        {"image": A, "label": "cat", "choices": ["dog", "cat"]},
        {**meant(CLASS, "cat"), "choices": ["dog", "cat"]},
    ),
    read(
        "Classes by number with choices",
        {"image": A, "label": 1, "choices": ["dog", "cat"]},
        {**meant(CLASS, "cat"), "choices": ["dog", "cat"]},
    ),
    read("{path, label}", {"path": A, "label": "cat"}, meant(CLASS, "cat")),
    refused("Classes by number", {"image": A, "label": 1}, "a number without its name"),
    refused(
        "Hateful Memes, {id, img, label, text}",
        {"id": 1, "img": A, "label": 0, "text": "Look at it."},
        "found the keys ['id', 'img', 'label', 'text']",
    ),
    refused(
        "MedMCQA, opa, opb, cop",
        {"id": "x", "question": "What is it?", "opa": "a dog", "opb": "a cat", "cop": 1},
        "the key 'opa'",
    ),
]

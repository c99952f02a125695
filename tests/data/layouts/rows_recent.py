"""Rows of sets and tools of 2024 to 2026: lists as tools print them, tags, reasoning, and sets of questions."""

from tests.data.layouts.rows import A, B, chat, meant, read, refused, said

ASKED = {"image": A, "question": "What is it?"}
ONE = meant("What is it?", "a cat")
TALK = said("<image>\nWhat is it?", "A cat.")
SAID = meant("<image>What is it?", "A cat.")
PYTHONS_LIST = {**ONE, "turns": [("<image>What is it?", "cat")], "references": ["cat", "a cat", "cat"]}

LAYOUTS = [
    # numbers, lists and columns as tools write them
    read(
        "Choices of numbers, the answer as text",
        {**ASKED, "choices": [2, 3, 4], "answer": "3"},
        meant("What is it?", "3", choices=["2", "3", "4"]),
    ),
    read(
        "Choices of numbers, an answer that is no place",
        {**ASKED, "choices": [2, 3, 4], "answer": 4},
        meant("What is it?", "4", choices=["2", "3", "4"]),
    ),
    refused(
        "Choices of numbers, an answer that is a place, too",
        {**ASKED, "choices": [2, 3, 4], "answer": 2},
        "one of the choices ['2', '3', '4'] and the place of another",
    ),
    read(
        "datasets' sequence of turns, from and value as lists",
        {
            "image": A,
            "conversations": {"from": ["human", "gpt"], "value": ["<image>\nWhat is it?", "A cat."]},
        },
        SAID,
    ),
    read(
        "datasets' sequence of turns, role and content as lists",
        {"image": A, "messages": {"role": ["user", "assistant"], "content": ["What is it?", "A cat."]}},
        SAID,
    ),
    refused(
        "datasets' sequence of turns, lists of other lengths",
        {"image": A, "messages": {"role": ["user", "assistant"], "content": ["What is it?"]}},
        "do not belong together",
    ),
    read(
        "Answers of people as Python prints them",
        {**ASKED, "answers": "['a cat', 'cat', 'cat']"},
        PYTHONS_LIST,
    ),
    refused(
        "Answers of people as numpy prints them",
        {**ASKED, "answers": "['a cat' 'cat' 'cat']"},
        "answers is str",
    ),
    refused(
        "Choices as numpy prints them",
        {**ASKED, "choices": "['a dog' 'a cat']", "answer": "a cat"},
        "choices is str",
    ),
    read(
        "Images as Python prints them (VLMEvalKit)",
        {**ASKED, "image": f"['{A}', '{B}']", "answer": "a cat"},
        meant("What is it?", "a cat", images=(A, B)),
    ),
    refused("Turns as Python prints them", {"image": A, "conversations": str(TALK)}, "conversations is str"),
    # tags
    refused(
        "<video> under system",
        {"system": "Watch <video>.", "question": "What?", "answer": "A cat."},
        "the words under 'system' hold <video>",
    ),
    refused(
        "<image 1> under system",
        {**ASKED, "system": "See <image 1>.", "answer": "a cat"},
        "the words under 'system' hold <image 1>",
    ),
    read(
        "<video> under system as text, with data.ignore",
        {"system": "Watch <video>.", "question": "What?", "answer": "A cat."},
        meant("What?", "A cat.", images=(), system="Watch <video>."),
        ignore=["<video>"],
    ),
    read(
        "InternVL, <ref> and <box> in the answer",
        {
            "image": A,
            "conversations": said(
                "<image>\nWhere is <ref>it</ref>?", "<ref>it</ref><box>[[1, 2, 3, 4]]</box>"
            ),
        },
        meant("<image>Where is <ref>it</ref>?", "<ref>it</ref><box>[[1, 2, 3, 4]]</box>"),
    ),
    read(
        "Florence-2, a task's tag as the prefix",
        {"image": A, "prefix": "<OD>", "suffix": "cat<loc_1><loc_2>"},
        meant("<OD>", "cat<loc_1><loc_2>"),
    ),
    read(
        "Molmo, points in the answer",
        {**ASKED, "answer": '<point x="1" y="2" alt="it">it</point>'},
        meant("What is it?", '<point x="1" y="2" alt="it">it</point>'),
    ),
    read(
        "Reasoning in tags, {images, problem, answer}",
        {
            "images": [A],
            "problem": "<image>What is it?",
            "answer": "<think>fur</think><answer>a cat</answer>",
        },
        meant("<image>What is it?", "<think>fur</think><answer>a cat</answer>"),
    ),
    # sets of questions
    read("RealWorldQA, image and image_path", {**ASKED, "answer": "a cat", "image_path": A}, ONE),
    read(
        "MME on the hub, the image's name in question_id",
        {**ASKED, "question_id": "code/0020.png", "answer": "a cat", "category": "code"},
        ONE,
    ),
    read(
        "Mantis, {images, conversation, source}",
        {"id": "1", "images": [A, B], "conversation": chat("<image> like <image>?", "No."), "source": "nlvr"},
        meant("<image>like <image>?", "No.", images=(A, B)),
    ),
    read(
        "Docmatix, {images, texts} with a source",
        {"images": [A], "texts": [{"user": "What is it?", "assistant": "A cat.", "source": "PDFA"}]},
        SAID,
    ),
    read(
        "ALLaVA, {conversations, url}",
        {"id": "1", "image": A, "conversations": TALK, "url": "https://x.org"},
        SAID,
    ),
    read(
        "ArxivQA, a letter under label and its rationale left out",
        {"id": "1", **ASKED, "options": ["A) a dog", "B) a cat"], "label": "B", "rationale": "It purrs."},
        meant("What is it?", "B) a cat", choices=["A) a dog", "B) a cat"]),
        ignore=["rationale"],
    ),
    refused(
        "ArxivQA, its rationale",
        {"id": "1", **ASKED, "options": ["A) a dog", "B) a cat"], "label": "B", "rationale": "It purrs."},
        "the key 'rationale'",
    ),
    refused(
        "CLEVR-Math, a number under label",
        {"template": "adding", "question": "How many?", "image": A, "label": 3},
        "data.columns: {answer: label}",
    ),
    read(
        "CLEVR-Math, a number under label, in data.columns",
        {"template": "adding", "question": "How many?", "image": A, "label": 3},
        meant("How many?", "3"),
        columns={"answer": "label"},
        ignore=["template"],
    ),
    refused(
        "Visual7W, the wrong choices alone",
        {
            "image": A,
            "qa_pairs": [{"question": "What is it?", "answer": "a cat", "multiple_choices": ["a dog"]}],
        },
        "the key 'multiple_choices'",
    ),
    refused(
        "VCR, a question of words and objects",
        {"img_fn": A, "question": ["Why", [0], "?"], "answer_choices": [["x"], ["y"]], "answer_label": 0},
        "question is list",
    ),
    refused(
        "DVQA, the box of an answer",
        {**ASKED, "answer": "a cat", "answer_bbox": [1, 2, 3, 4], "template_id": "data"},
        "the key 'answer_bbox'",
    ),
    refused(
        "MM-Vet, capability",
        {
            "imagename": A,
            "question": "What is it?",
            "answer": "a cat<OR>cat",
            "imagesource": "https://x.org",
            "capability": ["rec"],
        },
        "the key 'capability'",
    ),
    refused(
        "MathVision, two images of one",
        {**ASKED, "image": "images/1.jpg", "decoded_image": A, "answer": "a cat"},
        "the key 'decoded_image'",
    ),
    refused(
        "M4-Instruct, choice_list",
        {
            "image": [A, B],
            "conversations": said("<image><image> Same?", "No."),
            "metadata": {"dataset": "x"},
            "choice_list": ["Yes.", "No."],
        },
        "'choice_list'",
    ),
    refused(
        "VideoChat2, {i, q, a}",
        {"image": A, "QA": [{"i": "Look.", "q": "What is it?", "a": "A cat."}]},
        "found the keys ['a', 'i', 'image', 'q']",
    ),
    refused(
        "ChartQA-Pro, lists under Question and Answer",
        {"image": A, "Question": ["What is it?"], "Answer": ["a cat"], "Year": ["NO"]},
        "Question is list",
    ),
    refused(
        "SVIT, turns of turns", {"image": A, "conversations": [{"content": TALK}]}, "found the turn dict"
    ),
    refused(
        "Video-R1, {data_type, problem_type, path}",
        {
            "problem": "What is it?",
            "data_type": "image",
            "problem_type": "choice",
            "options": ["A. a dog", "B. a cat"],
            "solution": "<answer>B</answer>",
            "path": A,
        },
        "the key 'data_type'",
    ),
]

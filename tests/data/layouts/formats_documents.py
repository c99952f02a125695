"""Layouts of annotation documents: one JSON object that holds the rows."""

from pathlib import Path

from tests.data.layouts.layout import Layout
from tests.data.layouts.writing import document, images

INFO = {"description": "made for a test", "year": 2026, "version": "1.0"}
HEAD = {"info": INFO, "license": {"name": "ours"}, "data_type": "mscoco", "data_subtype": "val2014"}
COCO_IMAGE = "COCO_val2014_000000000042.png"
QUESTION = {"image_id": 42, "question": "Is it open?", "question_id": 42000}
PEOPLE = [{"answer": "yes", "answer_confidence": "yes", "answer_id": n} for n in (1, 2)]
ANNOTATION = {
    "question_id": 42000,
    "image_id": 42,
    "question_type": "is it",
    "answer_type": "yes/no",
    "multiple_choice_answer": "yes",
    "answers": [*PEOPLE, {"answer": "no", "answer_confidence": "maybe", "answer_id": 3}],
}
ANSWERED = {
    "images": [COCO_IMAGE],
    "turns": [("<image>Is it open?", "yes")],
    "references": ["yes", "yes", "no"],
}
DESCRIBE = "<image>Describe this image."


def caption(name: str, text: str, **more) -> dict:
    return {"images": [name], "turns": [(DESCRIBE, text)], **more}


def coco(folder: Path) -> str:
    images(folder, "000000000042.png", "000000000043.png")
    facts = {"license": 3, "height": 2, "width": 2, "date_captured": "2026-01-02", "coco_url": "none"}
    return document(
        folder,
        "captions_val2017.json",
        {
            "info": INFO,
            "licenses": [{"id": 3, "name": "ours", "url": "none"}],
            "images": [{"id": number, "file_name": f"{number:012}.png", **facts} for number in (42, 43)],
            "annotations": [
                {"image_id": 43, "id": 7, "caption": "a closed door"},
                {"image_id": 42, "id": 8, "caption": "an open door"},
            ],
        },
    )


def vqa_questions(folder: Path, *questions: dict) -> str:
    images(folder, COCO_IMAGE)
    value = HEAD | {"task_type": "Open-Ended", "questions": list(questions or [QUESTION])}
    return document(folder, "v2_OpenEnded_mscoco_val2014_questions.json", value)


def vqa_annotations(folder: Path) -> str:
    return document(folder, "v2_mscoco_val2014_annotations.json", HEAD | {"annotations": [ANNOTATION]})


def karpathy(folder: Path) -> str:
    images(folder, "val2014/a.png", "train2014/b.png")
    rows = [
        {
            "filepath": where,
            "filename": name,
            "imgid": number,
            "cocoid": 40 + number,
            "split": split,
            "sentids": [2 * number, 2 * number + 1],
            "sentences": [
                {"tokens": text.split(), "raw": text, "imgid": number, "sentid": 2 * number + n}
                for n, text in enumerate(("a red door", "a door"))
            ],
        }
        for number, (where, name, split) in enumerate(
            (("val2014", "a.png", "test"), ("train2014", "b.png", "train"))
        )
    ]
    return document(folder, "dataset_coco.json", {"images": rows, "dataset": "coco"})


def text_vqa(folder: Path) -> str:
    images(folder, "0f3a.png")
    row = {
        "question": "What does the sign say?",
        "image_id": "0f3a",
        "image_classes": ["Sign"],
        **dict.fromkeys(("flickr_original_url", "flickr_300k_url"), "none"),
        **dict.fromkeys(("image_width", "image_height"), 2),
        "answers": ["stop", "stop", "halt"],
        "question_tokens": ["what", "does", "the", "sign", "say"],
        "question_id": 9,
        "set_name": "train",
    }
    head = {"dataset_type": "train", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    return document(folder, "TextVQA_0.5.1_train.json", head | {"data": [row]})


def doc_vqa(folder: Path) -> str:
    images(folder, "documents/abcd0001_1.png")
    row = {
        "questionId": 5,
        "question": "Who signed?",
        "question_types": ["handwritten"],
        "image": "documents/abcd0001_1.png",
        "docId": 11,
        "ucsf_document_id": "abcd0001",
        "ucsf_document_page_no": "1",
        "answers": ["A. Turner", "Turner"],
        "data_split": "val",
    }
    head = {"dataset_name": "SP-DocVQA", "dataset_version": "1.0", "dataset_split": "val"}
    return document(folder, "val_v1.0.json", head | {"data": [row]})


def gqa(folder: Path) -> str:
    images(folder, "2370799.png")
    row = {
        "semantic": [{"operation": "select", "dependencies": [], "argument": "door (1)"}],
        "entailed": [],
        "equivalent": ["07"],
        "question": "Is the door open?",
        "imageId": "2370799",
        "isBalanced": True,
        "groups": {"global": None, "local": "06"},
        "answer": "yes",
        "semanticStr": "select: door (1)",
        "annotations": {"answer": {}, "question": {"2": "1"}, "fullAnswer": {}},
        "types": {"detailed": "existAttr", "semantic": "attr", "structural": "verify"},
        "fullAnswer": "Yes, it is open.",
    }
    return document(folder, "val_balanced_questions.json", {"07": row})


def r2gen(folder: Path) -> str:
    images(folder, "CXR1/0.png", "CXR1/1.png")
    row = {"id": "CXR1", "report": "The lungs are clear .", "image_path": ["CXR1/0.png", "CXR1/1.png"]}
    splits = {split: [row | {"id": f"CXR1-{split}", "split": split}] for split in ("train", "val", "test")}
    return document(folder, "annotation.json", splits)


def science_qa(folder: Path) -> str:
    images(folder, "train/1/image.png")
    row = {
        "question": "Which is a metal?",
        "choices": ["wood", "iron"],
        "answer": 1,
        "hint": "Metals conduct.",
        "image": "image.png",
        "task": "closed choice",
        **dict.fromkeys(("grade", "subject", "topic", "category", "skill", "lecture"), "of metals"),
        "solution": "Iron is a metal.",
        "split": "train",
    }
    without = row | {"image": None, "hint": "", "answer": 0, "split": "test"}
    return document(folder, "problems.json", {"1": row, "2": without})


def by_id(folder: Path) -> str:
    images(folder, "1.png")
    return document(
        folder, "own.json", {"a": {"image": "1.png", "question": "Which?", "answer": "this"}}, indent=2
    )


def in_a_list(folder: Path, **more) -> str:
    images(folder, "1.png")
    rows = [{"image": "1.png", "question": "Which?", "answer": "this"}]
    return document(folder, "own.json", {"version": "v1.0", "data": rows, **more}, indent=2)


OWN = [{"images": ["1.png"], "turns": [("<image>Which?", "this")]}]
DOORS = ["a red door", "a door"]
KARPATHY_TEST = [caption("val2014/a.png", DOORS[0], references=DOORS)]
R2GEN_TRAIN = [
    {
        "images": ["CXR1/0.png", "CXR1/1.png"],
        "turns": [("<image><image>Describe this image.", "The lungs are clear .")],
    }
]
LAYOUTS = [
    Layout(
        "COCO captions_val2017.json",
        coco,
        [caption("000000000043.png", "a closed door"), caption("000000000042.png", "an open door")],
    ),
    Layout("VQA v2: questions alone", vqa_questions, refused="questions without their answers"),
    Layout(
        "VQA v2: questions alone, beside their annotations",
        lambda f: (vqa_annotations(f), vqa_questions(f))[1],
        refused="v2_OpenEnded_mscoco_val2014_questions.json+",
    ),
    Layout(
        "VQA v2: annotations alone",
        lambda f: (vqa_questions(f), vqa_annotations(f))[1],
        refused="v2_OpenEnded_mscoco_val2014_questions.json",
    ),
    Layout(
        "VQA v2 and OK-VQA: questions+annotations",
        lambda f: f"{vqa_questions(f)}+{vqa_annotations(f)}",
        [ANSWERED],
    ),
    Layout("VQA v2: annotations+questions", lambda f: f"{vqa_annotations(f)}+{vqa_questions(f)}", [ANSWERED]),
    Layout(
        "VQA v2: a question without annotation",
        lambda f: f"{vqa_questions(f, QUESTION, QUESTION | {'question_id': 7})}+{vqa_annotations(f)}",
        refused="no entry of annotations refers to it",
    ),
    Layout(
        "VQA v2: test questions, for prediction",
        vqa_questions,
        [{"images": [COCO_IMAGE], "turns": [("<image>Is it open?", None)]}],
        settings={"require_answers": False},
    ),
    Layout("Karpathy's dataset_coco.json", karpathy, refused="dataset_coco.json:train"),
    Layout(
        "Karpathy's dataset_coco.json:train+test",
        lambda f: karpathy(f) + ":train+test",
        [*KARPATHY_TEST, caption("train2014/b.png", DOORS[0], references=DOORS)],
    ),
    Layout(
        "Karpathy's dataset_coco.json:train, to learn",
        lambda f: karpathy(f) + ":train",
        [caption("train2014/b.png", door, references=None) for door in DOORS],
        settings={"each_caption": True},
    ),
    Layout("Karpathy's dataset_coco.json:test", lambda f: karpathy(f) + ":test", KARPATHY_TEST),
    Layout(
        "TextVQA",
        text_vqa,
        [
            {
                "images": ["0f3a.png"],
                "turns": [("<image>What does the sign say?", "stop")],
                "references": ["stop", "stop", "halt"],
            }
        ],
    ),
    Layout(
        "DocVQA",
        doc_vqa,
        [
            {
                "images": ["documents/abcd0001_1.png"],
                "turns": [("<image>Who signed?", "A. Turner")],
                "references": ["A. Turner", "Turner"],
            }
        ],
    ),
    Layout(
        "GQA questions by their ids",
        gqa,
        [{"images": ["2370799.png"], "turns": [("<image>Is the door open?", "yes")]}],
    ),
    Layout("R2Gen annotation.json (IU X-ray, MIMIC-CXR)", r2gen, refused="annotation.json:test"),
    Layout("R2Gen annotation.json:train", lambda f: r2gen(f) + ":train", R2GEN_TRAIN),
    Layout("ScienceQA problems.json", science_qa, refused="problems.json:test"),
    Layout(
        "ScienceQA problems.json:train",
        lambda f: science_qa(f) + ":train",
        [
            {
                "images": ["train/1/image.png"],
                "turns": [("<image>Metals conduct.\nWhich is a metal?", "iron")],
                "choices": ["wood", "iron"],
            }
        ],
    ),
    Layout(
        "ScienceQA problems.json:test, a row without image",
        lambda f: science_qa(f) + ":test",
        [{"images": [], "turns": [("Which is a metal?", "wood")], "choices": ["wood", "iron"]}],
    ),
    Layout(
        "LLaMA-Factory dataset_info.json",
        lambda f: document(f, "dataset_info.json", {"own": {"file_name": "own.json"}}),
        refused="holds no rows",
    ),
    Layout("own document: rows by their ids", by_id, OWN),
    Layout("own document: rows in one list", in_a_list, OWN),
    Layout(
        "own document: a key beside the rows that is not known",
        lambda f: in_a_list(f, prefix="Answer briefly."),
        refused="'prefix'",
    ),
    Layout(
        "own document: the same, the list named",
        lambda f: in_a_list(f, prefix="Answer briefly.") + ":data",
        OWN,
    ),
    Layout(
        "own document: two lists that do not refer to each other",
        lambda f: in_a_list(f, more=[{"image": "1.png"}]),
        refused="name the one whose entries are the rows",
    ),
]

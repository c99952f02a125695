"""Captions, preferences and sets of medicine, retail and inspection of 2024 to 2026, as they are published."""

from tests.data.layouts.rows import CLASS, A, B, chat, meant, read, refused, said

ASKED = {"image": A, "question": "What is it?"}
PICKED = meant("What is it?", "a cat", choices=["a dog", "a cat"])
TALK = said("<image>\nWhat is it?", "A cat.")

LAYOUTS = [
    # captions
    refused(
        "NoCaps on the hub, annotations_captions",
        {"image": A, "annotations_captions": ["one", "two"]},
        "'annotations_captions'",
    ),
    refused(
        "TextCaps on the hub, caption_str beside a question",
        {**ASKED, "caption_str": ["a cat"]},
        "the key 'caption_str'",
    ),
    refused(
        "LLaVA pre-training, blip_caption",
        {"id": "1", "image": A, "caption": "a cat", "blip_caption": "cat"},
        "the key 'blip_caption'",
    ),
    refused(
        "PixMo-points, a count and its points",
        {"image": A, "label": "cats", "count": 3, "points": {"x": [1]}},
        "the key 'count'",
    ),
    refused(
        "RefCOCO, sentences of a box",
        {"image_path": A, "sentences": [{"raw": "the cat"}], "bbox": [1, 2, 3, 4]},
        "the key 'bbox'",
    ),
    refused(
        "OBELICS, texts and images in turn",
        {"images": [A, None], "texts": [None, "a cat"]},
        "found the image NoneType",
    ),
    # preferences
    read(
        "MMPR, {image, question, chosen, rejected}",
        {**ASKED, "chosen": "a cat", "rejected": "a dog"},
        meant("What is it?", "a cat", choices=["a cat", "a dog"]),
    ),
    refused(
        "LLaVA-RLHF, output_1, output_2 and preference",
        {
            "id": "1",
            "image": A,
            "conversations": said("<image>\nWhat is it?"),
            "output_1": {"from": "llava", "value": "A cat."},
            "output_2": {"from": "llava", "value": "A dog."},
            "preference": 1,
        },
        "'output_1'",
    ),
    refused(
        "POVID, rejected_conversations",
        {
            "id": "1",
            "image": A,
            "conversations": TALK,
            "rejected_conversations": said("<image>\nWhat is it?", "A dog."),
        },
        "the key 'rejected_conversations'",
    ),
    # medicine, retail and inspection
    refused(
        "OmniMedVQA, gt_answer and modality_type",
        {
            **ASKED,
            "image": None,
            "image_path": A,
            "gt_answer": "a cat",
            "option_A": "a dog",
            "option_B": "a cat",
            "modality_type": "CT",
        },
        "the key 'gt_answer'",
    ),
    read(
        "OmniMedVQA, gt_answer and modality_type, in data.columns",
        {
            "question": "What is it?",
            "image_path": A,
            "gt_answer": "a cat",
            "option_A": "a dog",
            "option_B": "a cat",
            "modality_type": "CT",
        },
        PICKED,
        columns={"answer": "gt_answer"},
        ignore=["modality_type"],
    ),
    refused(
        "MedXpertQA, options of objects",
        {
            **ASKED,
            "options": [{"letter": "A", "content": "a dog"}, {"letter": "B", "content": "a cat"}],
            "label": "B",
        },
        "choices is dict",
    ),
    refused(
        "PathMMU, an explanation",
        {**ASKED, "options": ["a dog", "a cat"], "answer": "a cat", "explanation": "fur"},
        "the key 'explanation'",
    ),
    refused(
        "ISIC, diagnosis and target", {"image_name": A, "diagnosis": "nevus", "target": 0}, "'diagnosis'"
    ),
    refused(
        "Quilt-1M, roi_text", {"caption": "a cat", "image_path": A, "roi_text": "fur"}, "the key 'roi_text'"
    ),
    refused(
        "DeepWeeds, Label and Species",
        {"Filename": A, "Label": 0, "Species": "rubber vine"},
        "without its name",
    ),
    refused(
        "Shopee, title and label_group", {"image": A, "title": "a cat", "label_group": 3}, "'label_group'"
    ),
    refused(
        "VisA, an object and its mask",
        {"object": "candle", "label": "anomaly", "image": A, "mask": B},
        "the key 'object'",
    ),
    read(
        "VisA, its object and mask left out",
        {"object": "candle", "label": "anomaly", "image": A, "mask": B},
        meant(CLASS, "anomaly"),
        ignore=["object", "mask"],
    ),
    refused(
        "MMAD, a conversation of Question and Options",
        {
            "image_path": A,
            "conversation": [{"Question": "What is it?", "Answer": "A", "Options": {"A": "a cat"}}],
        },
        "found the turn dict",
    ),
    refused(
        "ERNIE, image_info and text_info",
        {"image_info": [{"image_url": A}], "text_info": [{"text": "What?"}]},
        "found the keys ['image_info', 'text_info']",
    ),
    refused(
        "EXAMS-V, an answer_key and no question",
        {"image": A, "answer_key": "A", "subject": "x"},
        "'answer_key'",
    ),
    refused(
        "OpenAI, a name in a turn",
        {
            "messages": [
                {"role": "user", "name": "bob", "content": "What?"},
                {"role": "assistant", "content": "A cat."},
            ]
        },
        "the key 'name' in the turn",
    ),
    refused(
        "ms-swift, objects without tags",
        {
            "messages": chat("<image>Where?", "[1, 2]"),
            "images": [A],
            "objects": {"ref": ["cat"], "bbox": [[1, 2, 3, 4]]},
        },
        "the key 'objects'",
    ),
    refused(
        "ms-swift, loss false of an answer",
        {
            "messages": [
                {"role": "user", "content": "What?"},
                {"role": "assistant", "content": "A cat.", "loss": False},
            ]
        },
        "'loss' in the turn",
    ),
    refused(
        "Image editing, source_img and target_img",
        {"source_img": A, "target_img": B, "instruction": "Red."},
        "'source_img'",
    ),
]

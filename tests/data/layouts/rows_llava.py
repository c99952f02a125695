"""Conversations of LLaVA and of the models and data sets after it."""

from tests.data.layouts.rows import CLIP, A, B, chat, frames, meant, read, refused, said

PLAIN = meant("What is it?", "A cat.", images=())
ONE = meant("What is it?", "A cat.")

LAYOUTS = [
    read(
        "LLaVA, {id, image, conversations}",
        {"id": "1", "image": A, "conversations": said("<image>\nWhat is it?", "A cat.")},
        ONE,
    ),
    read(
        "LLaVA, marker behind the question",
        {"id": "1", "image": A, "conversations": said("What is it?\n<image>", "A cat.")},
        ONE,
    ),
    read(
        "LLaVA, two turns",
        {"id": "1", "image": A, "conversations": said("<image>\nWhat is it?", "A cat.", "Old?", "Yes.")},
        meant("What is it?", "A cat.", "Old?", "Yes."),
    ),
    read(
        "LLaVA, text alone with the model that wrote it",
        {"id": "x", "model": "gpt-4", "conversations": said("What is it?", "A cat.")},
        PLAIN,
    ),
    read(
        "LLaVA, ids of images that repeat in one array",
        [
            {"id": "7", "image": A, "conversations": said("<image>\nWhat is it?", "A cat.")},
            {"id": "7", "image": A, "conversations": said("<image>\nOld?", "Yes.")},
        ],
        {**ONE, "id": "7"},
        {**meant("Old?", "Yes."), "id": "7#2"},
        file="data.json",
    ),
    read(
        "LLaVA-OneVision, {..., data_source}",
        {
            "id": "1",
            "image": A,
            "data_source": "web",
            "conversations": said("<image>\nWhat is it?", "A cat."),
        },
        ONE,
    ),
    read(
        "LLaVA-Med, {conversatons, domain}",
        {
            "id": "1",
            "image": A,
            "domain": {"mri": True},
            "conversatons": said("<image>\nWhat is it?", "A cat."),
        },
        ONE,
    ),
    read(
        "LLaVA, several images and interleaved markers",
        {"id": "1", "image": [A, B], "conversations": said("Is <image> like <image>?", "No.")},
        meant("Is <image> like <image>?", "No.", images=(A, B)),
    ),
    read(
        "InternVL, {width, height}",
        {
            "id": 1,
            "image": A,
            "width": 2,
            "height": 2,
            "conversations": said("<image>\nWhat is it?", "A cat."),
        },
        ONE,
    ),
    read(
        "InternVL, {width_list, height_list}",
        {
            "id": 1,
            "image": [A, B],
            "width_list": [2, 2],
            "height_list": [2, 2],
            "conversations": said("<image>\n<image>\nSame?", "No."),
        },
        meant("Same?", "No.", images=(A, B)),
    ),
    read(
        "MiniCPM-V, {role, content} under conversations",
        {"id": "1", "image": A, "conversations": chat("<image>\nWhat is it?", "A cat.")},
        ONE,
    ),
    read(
        "MiniCPM-V, images by tag",
        {
            "id": "1",
            "image": {"<image_01>": B, "<image_00>": A},
            "conversations": chat("<image_00>\n<image_01>\nSame?", "No."),
        },
        meant("Same?", "No.", images=(A, B)),
    ),
    read(
        "MiniCPM-V, (<image>./</image>)",
        {"image": A, "conversations": chat("(<image>./</image>)\nWhat is it?", "A cat.")},
        ONE,
    ),
    read(
        "Phi-3-vision, <|image_1|>",
        {"images": [A], "messages": chat("<|image_1|>\nWhat is it?", "A cat.")},
        ONE,
    ),
    read(
        "InternLM-XComposer, <ImageHere>",
        {
            "id": "0",
            "image": [A],
            "conversations": said("<ImageHere>What is it?", "A cat.", roles=("user", "assistant")),
        },
        ONE,
    ),
    read(
        "DeepSeek-VL, <image_placeholder>",
        {"images": [A], "messages": chat("<image_placeholder>What is it?", "A cat.")},
        ONE,
    ),
    read(
        "Qwen-VL, <img>path</img>",
        {
            "id": "1",
            "conversations": said(
                "Picture 1: <img>a.png</img>\nWhat is it?", "A cat.", roles=("user", "assistant")
            ),
        },
        meant("Picture 1: <image>\nWhat is it?", "A cat."),
    ),
    read(
        "Qwen2.5-VL, {image, conversations}",
        {"image": A, "conversations": said("<image>\nWhat is it?", "A cat.")},
        ONE,
    ),
    read(
        "Qwen2.5-VL, packed: a row is a list of rows",
        [
            [
                {"image": A, "conversations": said("<image>\nWhat is it?", "A cat.")},
                {"image": B, "conversations": said("<image>\nOld?", "Yes.")},
            ]
        ],
        ONE,
        meant("Old?", "Yes.", images=(B,)),
        file="data.json",
    ),
    read("A row that is a list of messages", [chat("What is it?", "A cat.")], PLAIN, file="data.json"),
    read(
        "Qwen2.5-VL, {video, conversations}",
        {"video": CLIP, "conversations": said("<video>\nWhat is it?", "A cat.")},
        meant("<image>" * 8 + "What is it?", "A cat.", images=frames(0, 1, 3, 4, 6, 7, 9, 11)),
        files=(CLIP,),
    ),
    refused(
        "LLaVA, <image> without an image",
        {"id": "1", "conversations": said("<image>\nWhat is it?", "A cat.")},
        "found 1 <image> for 0 image",
    ),
    refused(
        "LLaVA, two <image> for one image",
        {"id": "1", "image": A, "conversations": said("<image>\n<image>\nWhat is it?", "A cat.")},
        "found 2 <image> for 1 image",
    ),
    refused(
        "LLaVA, the answer holds <image>",
        {"id": "1", "image": A, "conversations": said("What is it?", "<image>")},
        "an answer, holds <image>",
    ),
    refused(
        "LLaVA, the assistant speaks first",
        {"id": "1", "image": A, "conversations": said("A cat.", roles=("gpt", "human"))},
        "turn 1 is from the assistant",
    ),
    read(
        "llava-instruct-mix-vsft, parts with index",
        {
            "images": [A],
            "messages": chat(
                [
                    {"type": "text", "text": "What is it?", "index": None},
                    {"type": "image", "text": None, "index": 0},
                ],
                [{"type": "text", "text": "A cat.", "index": None}],
            ),
        },
        ONE,
    ),
    read(
        "The Cauldron, {images, texts}",
        {
            "images": [A],
            "texts": [
                {"user": "What is it?", "assistant": "A cat.", "source": "own"},
                {"user": "Old?", "assistant": "Yes.", "source": "own"},
            ],
        },
        meant("What is it?", "A cat.", "Old?", "Yes."),
    ),
    read(
        "FineVision, ratings of its texts",
        {
            "images": [A],
            "texts": [{"user": "What is it?", "assistant": "A cat."}],
            "source": "own",
            "relevance_ratings": [5],
            "relevance_min": 5,
            "formatting_ratings": [5],
        },
        ONE,
    ),
]

"""Conversations: LLaVA and its kin, OpenAI's messages, and what tools for finetuning make of both."""

import base64

from tests.data.layouts.writing import A, B, chat, meant, png, read, refused, said

URL = f"data:image/png;base64,{base64.b64encode(png()).decode()}"
IMAGE_PART, ASKED = {"type": "image"}, {"type": "text", "text": "What is it?"}
PLAIN = meant("What is it?", "A cat.", images=())
ONE = meant("What is it?", "A cat.")
SYSTEM = {"role": "system", "content": "Be brief."}

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
    refused(
        "Qwen2.5-VL, {video, conversations}",
        {"video": "a.mp4", "conversations": said("<video>\nWhat is it?", "A cat.")},
        "video is str 'a.mp4': video is not read",
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
        "ShareGPT, {system, tools: []}",
        {"conversations": said("What is it?", "A cat."), "system": "Be brief.", "tools": "[]"},
        {**PLAIN, "system": "Be brief."},
    ),
    read(
        "ShareGPT, from chatgpt",
        {"id": "x", "conversations": said("What is it?", "A cat.", roles=("human", "chatgpt"))},
        PLAIN,
    ),
    read(
        "ShareGPT, a system turn",
        {"conversations": [{"from": "system", "value": "Be brief."}, *said("What is it?", "A cat.")]},
        {**PLAIN, "system": "Be brief."},
    ),
    refused(
        "ShareGPT, tools",
        {"conversations": [*said("What is it?", "A cat.")], "tools": '[{"name": "look"}]'},
        "found 'tools': tools are not read",
    ),
    refused(
        "ShareGPT, a function_call turn",
        {"conversations": [{"from": "human", "value": "Look."}, {"from": "function_call", "value": "{}"}]},
        "tools are not read",
    ),
    read(
        "LLaMA-Factory, sharegpt with images",
        {"messages": chat("<image>What is it?", "A cat."), "images": [A]},
        ONE,
    ),
    read(
        "LLaMA-Factory v1, parts {type, value}",
        {
            "messages": chat(
                [{"type": "image_url", "value": A}, {"type": "text", "value": "What is it?"}],
                [{"type": "text", "value": "A cat."}],
            )
        },
        ONE,
    ),
    read(
        "LLaMA-Factory v1, loss_weight of nothing",
        {"messages": [{**turn, "weight": 1} for turn in chat("What is it?", "A cat.")]},
        PLAIN,
    ),
    refused(
        "LLaMA-Factory, videos",
        {"messages": chat("<video>What is it?", "A cat."), "videos": ["a.mp4"]},
        "videos is list ['a.mp4']: video is not read",
    ),
    refused(
        "LLaMA-Factory, audios",
        {"messages": chat("<audio>What is it?", "A cat."), "audios": ["a.wav"]},
        "audios is list ['a.wav']: audio is not read",
    ),
    read(
        "LLaMA-Factory, videos of none",
        {"messages": chat("<image>What is it?", "A cat."), "images": [A], "videos": [], "audios": []},
        ONE,
    ),
    refused(
        "<video> without a video", {"messages": chat("<video>What is it?", "A cat.")}, "a text holds <video>"
    ),
    read(
        "<video> as text, with data.ignore",
        {"messages": chat("What is <video>?", "A tag.")},
        meant("What is <video>?", "A tag.", images=()),
        ignore=["<video>"],
    ),
    read("OpenAI messages", {"messages": chat("What is it?", "A cat.")}, PLAIN),
    read(
        "OpenAI messages, a system turn",
        {"messages": [SYSTEM, *chat("What is it?", "A cat.")]},
        {**PLAIN, "system": "Be brief."},
    ),
    read(
        "OpenAI messages, a developer turn",
        {"messages": [{"role": "developer", "content": "Be brief."}, *chat("What is it?", "A cat.")]},
        {**PLAIN, "system": "Be brief."},
    ),
    read(
        "OpenAI vision, image_url with data:",
        {
            "messages": chat(
                [ASKED, {"type": "image_url", "image_url": {"url": URL, "detail": "low"}}], "A cat."
            )
        },
        meant("What is it?", "A cat.", images=(png(),)),
    ),
    refused(
        "OpenAI vision, image_url on the web",
        {
            "messages": chat(
                [ASKED, {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}], "A cat."
            )
        },
        "download URLs first",
    ),
    refused(
        "OpenAI, tool_calls",
        {
            "messages": [
                {"role": "user", "content": "Look."},
                {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
            ]
        },
        "tools are not read",
    ),
    refused(
        "OpenAI, a tool turn",
        {"messages": [*chat("Look.", "Yes."), {"role": "tool", "content": "sun", "tool_call_id": "1"}]},
        "tools are not read",
    ),
    refused(
        "OpenAI, weight 0 of an answer",
        {
            "messages": [
                {"role": "user", "content": "Look."},
                {"role": "assistant", "content": "Yes.", "weight": 0},
            ]
        },
        "the key 'weight' in the turn",
    ),
    refused(
        "OpenAI, a second system turn",
        {"messages": [*chat("What is it?", "A cat."), SYSTEM]},
        "a system turn that is not the first",
    ),
    refused(
        "A system turn and another system column",
        {"system": "Be long.", "messages": [SYSTEM, *chat("What is it?", "A cat.")]},
        "a system turn and 'system' with another text",
    ),
    read(
        "OpenAI Responses, input_text and input_image",
        {
            "messages": chat(
                [{"type": "input_image", "image_url": A}, {"type": "input_text", "text": "What is it?"}],
                "A cat.",
            )
        },
        ONE,
    ),
    read(
        "TRL vision, parts without names and images",
        {"images": [A], "messages": chat([IMAGE_PART, ASKED], [{"type": "text", "text": "A cat."}])},
        ONE,
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
    refused(
        "Parts whose index is out of order",
        {
            "images": [A, B],
            "messages": chat([{"type": "image", "index": 1}, {"type": "image", "index": 0}, ASKED], "A cat."),
        },
        "in the order of their index",
    ),
    read(
        "TRL, a system turn of parts",
        {
            "images": [A],
            "messages": [
                {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
                *chat([IMAGE_PART, ASKED], "A cat."),
            ],
        },
        {**ONE, "system": "Be brief."},
    ),
    read("TRL, prompt and completion as texts", {"prompt": "What is it?", "completion": "A cat."}, PLAIN),
    read(
        "TRL, prompt and completion as messages",
        {"prompt": chat("What is it?"), "completion": [{"role": "assistant", "content": "A cat."}]},
        PLAIN,
    ),
    read(
        "TRL, prompt of messages with images",
        {
            "images": [A],
            "prompt": chat([IMAGE_PART, ASKED]),
            "completion": [{"role": "assistant", "content": "A cat."}],
        },
        ONE,
    ),
    refused("TRL, a prompt alone", {"prompt": "What is it?"}, "the last question has no answer"),
    read(
        "Axolotl, parts with a path",
        {
            "messages": [
                SYSTEM,
                *chat([ASKED, {"type": "image", "path": A}], [{"type": "text", "text": "A cat."}]),
            ]
        },
        {**ONE, "system": "Be brief."},
    ),
    read(
        "Axolotl, parts with base64",
        {"messages": chat([ASKED, {"type": "image", "base64": URL}], [{"type": "text", "text": "A cat."}])},
        meant("What is it?", "A cat.", images=(png(),)),
    ),
    refused(
        "Axolotl, a turn that is not to be learnt",
        {
            "messages": [
                {"role": "user", "content": "Look."},
                {"role": "assistant", "content": "Yes.", "train": False},
            ]
        },
        "the key 'train' in the turn",
    ),
    refused(
        "Axolotl, segments without a template",
        {"segments": [{"label": True, "text": "A cat."}]},
        "found the keys ['segments']",
    ),
    read(
        "ms-swift, {messages, images}", {"messages": chat("<image>What is it?", "A cat."), "images": [A]}, ONE
    ),
    read(
        "ms-swift, {query, response, images}",
        {"query": "<image>What is it?", "response": "A cat.", "images": [A]},
        ONE,
    ),
    read(
        "ms-swift, {system, query, response, history}",
        {"system": "Be brief.", "query": "Old?", "response": "Yes.", "history": [["What is it?", "A cat."]]},
        meant("What is it?", "A cat.", "Old?", "Yes.", images=(), system="Be brief."),
    ),
    read(
        "ms-swift, a history of nothing",
        {"query": "What is it?", "response": "A cat.", "history": [], "images": []},
        PLAIN,
    ),
    refused(
        "ms-swift, objects and <bbox>",
        {
            "messages": chat("<image>Find <ref-object>", "<bbox>"),
            "images": [A],
            "objects": {"ref": ["cat"], "bbox": [[0, 0, 1, 1]]},
        },
        "a text holds <ref-object>",
    ),
    refused(
        "ms-swift, the number of a class",
        {"messages": chat("What is it?"), "images": [A], "label": 1},
        "label is int 1, a number without its name",
    ),
    refused(
        "ms-swift, pre-training (the assistant alone)",
        {"messages": [{"role": "assistant", "content": "A cat."}]},
        "turn 1 is from the assistant",
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
    read(
        "Messages as JSON in a cell",
        {
            "image": A,
            "messages": '[{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A cat."}]',
        },
        ONE,
    ),
    read(
        "Qwen's parts without a type",
        {"messages": chat([{"image": A}, {"text": "What is it?"}], [{"text": "A cat."}])},
        ONE,
    ),
    read(
        "MiniCPM-V chat, content of texts and parts",
        {"images": [A], "messages": chat([IMAGE_PART, "What is it?"], ["A cat."])},
        ONE,
    ),
    refused(
        "A part of a video",
        {"messages": chat([{"type": "video", "video": "a.mp4"}, ASKED], "A cat.")},
        "video is not read",
    ),
    refused(
        "Images inside of messages and beside them",
        {"images": [A], "messages": chat([{"type": "image", "image": B}, ASKED], "A cat.")},
        "images are given more than once",
    ),
    refused(
        "Reasoning beside an answer",
        {
            "messages": [
                {"role": "user", "content": "Look."},
                {"role": "assistant", "content": "Yes.", "reasoning_content": "hm"},
            ]
        },
        "the key 'reasoning_content' in the turn",
    ),
]

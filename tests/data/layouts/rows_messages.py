"""OpenAI's messages, with parts and system turns, and TRL's prompts and completions."""

import base64

from tests.data.layouts.rows import A, B, chat, meant, read, refused, said
from tests.data.layouts.writing import png

URL = f"data:image/png;base64,{base64.b64encode(png()).decode()}"
IMAGE_PART, ASKED = {"type": "image"}, {"type": "text", "text": "What is it?"}
PLAIN = meant("What is it?", "A cat.", images=())
ONE = meant("What is it?", "A cat.")
SYSTEM = {"role": "system", "content": "Be brief."}

LAYOUTS = [
    refused(
        "A system turn that holds <image>",
        {
            "image": A,
            "messages": [{"role": "system", "content": "See <image>."}, *chat("What is it?", "A cat.")],
        },
        "the system turn holds <image>",
    ),
    *(
        read(
            f"{name}, an answer that is JSON",
            {key: own("What is it?", text)},
            meant("What is it?", text, images=()),
        )
        for name, key, own in (("LLaVA", "conversations", said), ("OpenAI messages", "messages", chat))
        for text in ('[{"bbox_2d": [1, 2], "label": "cat"}]',)
    ),
    read(
        "LLaVA, an answer that is JSON of parts",
        {"conversations": said("What is it?", '[{"type": "text", "text": "hey"}]')},
        meant("What is it?", '[{"type": "text", "text": "hey"}]', images=()),
    ),
    read(
        "OpenAI messages, parts as JSON",
        {
            "messages": chat(
                f'[ {{"type": "image", "image": "{A}"}}, {{"type": "text", "text": "What is it?"}}]',
                '[{"type": "text", "text": "A cat."}]',
            )
        },
        ONE,
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
        "video is not read; name it under the row's key video",
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

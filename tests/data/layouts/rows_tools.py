"""Conversations as tools for finetuning document them: LLaMA-Factory, ms-swift, Axolotl."""

import base64

from tests.data.layouts.rows import CLIP, A, chat, frames, meant, read, refused, said
from tests.data.layouts.writing import png

URL = f"data:image/png;base64,{base64.b64encode(png()).decode()}"
ASKED = {"type": "text", "text": "What is it?"}
PLAIN = meant("What is it?", "A cat.", images=())
ONE = meant("What is it?", "A cat.")
SYSTEM = {"role": "system", "content": "Be brief."}

LAYOUTS = [
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
    read(
        "LLaMA-Factory, videos",
        {"messages": chat("<video>What is it?", "A cat."), "videos": [CLIP], "frames": 2},
        meant("<image><image>What is it?", "A cat.", images=frames(0, 11)),
        files=(CLIP,),
    ),
    read(
        "LLaMA-Factory, videos and images",
        {
            "messages": chat("Is <image> in <video> or in <video>?", "No."),
            "images": [A],
            "videos": [CLIP, CLIP],
            "frames": 2,
        },
        meant(
            "Is <image> in <image><image> or in <image><image>?",
            "No.",
            images=(A, *frames(0, 11), *frames(0, 11)),
        ),
        files=(A, CLIP),
    ),
    refused(
        "LLaMA-Factory, <video> in an answer",
        {"messages": chat("What is it?", "<video>"), "videos": [CLIP]},
        "found 1 <video> for 1 video(s); wanted one <video> each, in questions",
        files=(CLIP,),
    ),
    refused(
        "LLaMA-Factory, a <video> for two",
        {"messages": chat("<video>What is it?", "A cat."), "videos": [CLIP, CLIP]},
        "found 1 <video> for 2 video(s)",
        files=(CLIP,),
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
]

"""Preferences: DPO's pairs and KTO's labels, as TRL, LLaMA-Factory, ms-swift and data sets write them."""

from tests.data.layouts.rows import A, chat, meant, read, refused, said

PAIR = meant("What is it?", "A cat.", images=(), choices=["A cat.", "A dog."])
SEEN = meant("What is it?", "A cat.", choices=["A cat.", "A dog."])
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("A cat.", "A dog."))

LAYOUTS = [
    read("TRL DPO, texts", {"prompt": "What is it?", "chosen": "A cat.", "rejected": "A dog."}, PAIR),
    read("TRL DPO, messages", {"prompt": chat("What is it?"), "chosen": [GOOD], "rejected": [BAD]}, PAIR),
    read(
        "TRL DPO, whole conversations",
        {"chosen": chat("What is it?", "A cat."), "rejected": chat("What is it?", "A dog.")},
        PAIR,
    ),
    read(
        "TRL DPO, vision",
        {
            "images": [A],
            "prompt": chat([{"type": "image"}, {"type": "text", "text": "What is it?"}]),
            "chosen": [GOOD],
            "rejected": [BAD],
        },
        SEEN,
    ),
    read(
        "UltraFeedback, a prompt and whole conversations",
        {
            "prompt": "What is it?",
            "chosen": chat("What is it?", "A cat."),
            "rejected": chat("What is it?", "A dog."),
        },
        PAIR,
    ),
    refused(
        "TRL DPO, conversations of two questions",
        {"chosen": chat("What is it?", "A cat."), "rejected": chat("Who is it?", "A dog.")},
        "wanted the answer to the row's own question",
    ),
    refused(
        "TRL DPO, texts without a prompt",
        {"chosen": "A cat.", "rejected": "A dog."},
        "the row has no question",
    ),
    refused(
        "Chosen without rejected",
        {"question": "What is it?", "chosen": "A cat."},
        "found 'chosen' without 'rejected'",
    ),
    refused(
        "Chosen and rejected alike",
        {"question": "What is it?", "chosen": "A cat.", "rejected": "A cat."},
        "is given twice",
    ),
    read(
        "RLAIF-V, {question, chosen, rejected}",
        {
            "ds_name": "own",
            "image": A,
            "question": "What is it?",
            "chosen": "A cat.",
            "rejected": "A dog.",
            "origin_dataset": "own",
            "origin_split": "{}",
            "idx": 3,
            "image_path": "web/a.png",
        },
        SEEN,
    ),
    refused(
        "RLHF-V, the whole row as JSON under text",
        {"image": A, "text": '{"question": "What is it?", "chosen": "A cat.", "rejected": "A dog."}'},
        "'text' holds a whole row as JSON",
    ),
    read(
        "LLaMA-Factory DPO, sharegpt",
        {
            "conversations": said("What is it?"),
            "chosen": {"from": "gpt", "value": "A cat."},
            "rejected": {"from": "gpt", "value": "A dog."},
        },
        PAIR,
    ),
    read(
        "LLaMA-Factory DPO, sharegpt with images",
        {
            "conversations": said("<image>What is it?"),
            "chosen": {"from": "gpt", "value": "A cat."},
            "rejected": {"from": "gpt", "value": "A dog."},
            "images": [A],
        },
        SEEN,
    ),
    read(
        "LLaMA-Factory DPO, alpaca",
        {"instruction": "What is it?", "input": "", "chosen": "A cat.", "rejected": "A dog."},
        PAIR,
    ),
    read(
        "LLaMA-Factory KTO, label true",
        {"messages": chat("What is it?", "A cat."), "label": True},
        meant("What is it?", "A cat.", images=()),
    ),
    refused(
        "LLaMA-Factory KTO, label false",
        {"messages": chat("What is it?", "A dog."), "label": False},
        "label is false: the answer is a wrong one",
    ),
    read(
        "LLaMA-Factory KTO, label false left out",
        [
            {"messages": chat("What is it?", "A cat."), "label": True},
            {"messages": chat("What is it?", "A dog."), "label": False},
        ],
        meant("What is it?", "A cat.", images=()),
        on_bad_sample="skip",
    ),
    refused(
        "LLaMA-Factory KTO, kto_tag false",
        {"instruction": "What is it?", "output": "A dog.", "kto_tag": False},
        "kto_tag is false",
    ),
    read(
        "TRL KTO, label true",
        {"prompt": "What is it?", "completion": "A cat.", "label": True},
        meant("What is it?", "A cat.", images=()),
    ),
    refused(
        "TRL KTO, label false",
        {"prompt": "What is it?", "completion": "A dog.", "label": False},
        "label is false: the answer is a wrong one",
    ),
    read(
        "ms-swift DPO, rejected_response",
        {"messages": chat("<image>What is it?", "A cat."), "images": [A], "rejected_response": "A dog."},
        SEEN,
    ),
    read(
        "ms-swift DPO, rejected_messages",
        {"messages": chat("What is it?", "A cat."), "rejected_messages": chat("What is it?", "A dog.")},
        PAIR,
    ),
    refused(
        "ms-swift DPO, rejected_images",
        {
            "messages": chat("<image>What is it?", "A cat."),
            "images": [A],
            "rejected_response": "A dog.",
            "rejected_images": ["b.png"],
        },
        "'rejected_images'",
    ),
    read(
        "Argilla, chosen_response and rejected_response",
        {"instruction": "What is it?", "chosen_response": "A cat.", "rejected_response": "A dog."},
        PAIR,
    ),
    read(
        "Several rejected answers",
        {"question": "What is it?", "chosen": "A cat.", "rejected": ["A dog.", "A cow."]},
        {**PAIR, "choices": ["A cat.", "A dog.", "A cow."]},
    ),
    refused(
        "Scores of both answers",
        {
            "prompt": "What is it?",
            "chosen": "A cat.",
            "rejected": "A dog.",
            "score_chosen": 4.0,
            "score_rejected": 5.0,
        },
        "the key 'score_chosen'",
    ),
]

"""Captions and reports: one text about an image, or several."""

from tests.data.layouts.rows import CAPTION, A, B, meant, read, refused

ONE = meant(CAPTION, "a cat")
SEVERAL = {**ONE, "references": ["a cat", "one cat"]}

LEARNT = [("a cat", "7"), ("one cat", "7#2"), ("a cat", "7#3")]

LAYOUTS = [
    read("{image, text}", {"image": A, "text": "a cat"}, ONE),
    read("{file_name, text} (imagefolder)", {"file_name": A, "text": "a cat"}, ONE),
    read(
        "{image, instruction, text}",
        {"image": A, "instruction": "What is it?", "text": "a cat"},
        meant("What is it?", "a cat"),
    ),
    read(
        "{instruction, text}",
        {"instruction": "What is it?", "text": "a cat"},
        meant("What is it?", "a cat", images=()),
    ),
    read("BLIP and MiniGPT-4, {image, caption}", {"image": A, "caption": "a cat", "image_id": "x"}, ONE),
    read("BLIP, a list of captions", {"image": A, "caption": ["a cat", "one cat"]}, SEVERAL),
    read("{image, captions}", {"image": A, "captions": ["a cat", "one cat"]}, SEVERAL),
    read(
        "{image, captions}, to learn",
        {"image": A, "captions": ["a cat", "one cat", "a cat"], "id": "7"},
        *({**meant(CAPTION, text), "id": own} for text, own in LEARNT),
        each_caption=True,
    ),
    read(
        "{image, captions} of one, to learn",
        {"image": A, "captions": ["a cat"]},
        {**ONE, "references": ["a cat"]},
        each_caption=True,
    ),
    read(
        "A caption and all of its image's, to learn",
        {"image": A, "caption": "one cat", "answers": ["a cat", "one cat"]},
        {**meant(CAPTION, "one cat"), "references": ["one cat", "a cat"]},
        each_caption=True,
    ),
    read(
        "COCO captions, a row a caption",
        {
            "image_id": 3,
            "id": 5,
            "caption": "a cat",
            "file_name": A,
            "height": 2,
            "width": 2,
            "license": 1,
            "coco_url": "https://example.org/a.png",
        },
        ONE,
    ),
    read(
        "Karpathy's split, sentences of raw texts",
        {
            "filename": A,
            "imgid": 0,
            "sentids": [0, 1],
            "sentences": [
                {"raw": "a cat", "tokens": ["a", "cat"], "imgid": 0, "sentid": 0},
                {"raw": "one cat", "tokens": ["one", "cat"]},
            ],
            "split": "train",
            "cocoid": 3,
        },
        SEVERAL,
    ),
    read(
        "Karpathy's split, a folder under filepath",
        {"filepath": "val2014", "filename": A, "sentids": [0], "sentences": [{"raw": "a cat"}]},
        {**ONE, "images": ["val2014/a.png"], "references": ["a cat"]},
        files=("val2014/a.png",),
    ),
    read(
        "R2Gen, {report, image_path}",
        {"id": "CXR1", "report": "a cat", "image_path": [A, B], "split": "train"},
        meant(CAPTION, "a cat", images=(A, B)),
    ),
    read("Chest reports, findings", {"image": A, "findings": "a cat"}, ONE),
    refused(
        "Chest reports, findings and impression",
        {"image": A, "findings": "a cat", "impression": "none"},
        "the key 'impression'",
    ),
    read("ROCO csv, {id, name, caption}", {"id": "ROCO_1", "name": A, "caption": "a cat"}, ONE),
    read(
        "ROCOv2, {image, image_id, caption, cui}",
        {"image": A, "image_id": "R_1", "caption": "a cat", "cui": ["C01"]},
        ONE,
    ),
    read(
        "Flickr30k, comment_number and comment",
        [
            {"image_name": A, "comment_number": "0", "comment": "a cat"},
            {"image_name": A, "comment_number": "1", "comment": "one cat"},
        ],
        ONE,
        meant(CAPTION, "one cat"),
    ),
    read(
        "Flickr8k, {image, caption}",
        [{"image": A, "caption": "a cat"}, {"image": A, "caption": "one cat"}],
        ONE,
        meant(CAPTION, "one cat"),
    ),
    read(
        "An image and its name once more",
        {
            "image": A,
            "image_name": "x/a.png",
            "caption": "a cat",
            "url": "https://example.org/a.png",
            "sha256": "0",
        },
        ONE,
    ),
    refused(
        "An image by its URL alone",
        {"url": "https://example.org/a.png", "caption": "a cat"},
        "found 'caption' without an image",
    ),
    refused(
        "Two captions, {text, caption}", {"image": A, "text": "a cat", "caption": "one cat"}, "the key 'text'"
    ),
    refused("A caption and a title", {"image": A, "caption": "a cat", "title": "Cats"}, "the key 'title'"),
    refused(
        "A caption and a category", {"image": A, "text": "a cat", "category": "animal"}, "the key 'category'"
    ),
    refused("Plain text, {text}", {"text": "A cat sleeps."}, "found 'text' without an image"),
    refused(
        "Two images, {image, image_path}",
        {"image": A, "image_path": B, "text": "a cat"},
        "images are given more than once",
    ),
    refused(
        "Text to image, {image, prompt}", {"image": A, "prompt": "a cat"}, "the last question has no answer"
    ),
    refused(
        "Donut, {image, ground_truth}",
        {"image": A, "ground_truth": '{"gt_parse": {}}'},
        "found the keys ['ground_truth', 'image']",
    ),
    refused(
        "Questions and captions, {image, question, caption}",
        {"image": A, "question": "What is it?", "caption": "a cat"},
        "the key 'caption'",
    ),
    refused("An empty caption", {"image": A, "text": " "}, "an answer, is empty"),
]

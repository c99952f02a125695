"""Spellings of the place of an image in a question: each is placed, or refused by name."""

from tests.data.layouts.rows import A, B, chat, meant, read, refused, said

TWO = ("<image0>", "<image1>"), ("<image:1>", "<image:2>"), ("<Image 1>", "<Image 2>"), ("<IMAGE>", "<Image>")
ONE = (
    *("<IMAGE>", "<img>", "<IMG>", "<image1>", "<img><image></img>", "<Image><image></Image>"),
    *("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><image><|vision_end|>"),
)
IN_BRACKETS = ("[IMG]", "[image]", "[image1]", "[Image 1]", "![](a.png)", "![a cat](a.png)")

LAYOUTS = [
    *(
        read(
            f"Two images as {first} and {second}",
            {"images": [A, B], "question": f"Is {first} like {second}?", "answer": "no"},
            meant("Is <image> like <image>?", "no", images=(A, B)),
        )
        for first, second in TWO
    ),
    *(
        read(
            f"An image as {tag}",
            {"image": A, "conversations": said(f"See {tag} here", "A cat.")},
            meant("See <image> here", "A cat."),
        )
        for tag in ONE
    ),
    *(
        refused(
            f"An image as {tag}",
            {"image": A, "question": f"See {tag} here", "answer": "a cat"},
            f"a question holds {tag}",
        )
        for tag in IN_BRACKETS
    ),
    read(
        "An image as [IMG], as text with data.ignore",
        {"image": A, "question": "What is [IMG]?", "answer": "this"},
        meant("What is [IMG]?", "this"),
        ignore=["[IMG]"],
    ),
    read(
        "[Image 1] beside markers names an image",
        {"images": [A, B], "question": "[Image 1]: <image>\n[Image 2]: <image>\nSame?", "answer": "no"},
        meant("[Image 1]: <image>\n[Image 2]: <image>\nSame?", "no", images=(A, B)),
    ),
    read(
        "An answer in Markdown",
        {"messages": chat("What is it?", "![a cat](a.png) [1]")},
        meant("What is it?", "![a cat](a.png) [1]", images=()),
    ),
    refused(
        "<|vision_start|> without its end",
        {"image": A, "question": "<|vision_start|><image> What is it?", "answer": "a cat"},
        "a text holds <|vision_start|>",
    ),
    refused("<img> without an image", {"question": "See <img>", "answer": "a cat"}, "a text holds <img>"),
    refused(
        "<IMAGE> in an answer", {"image": A, "question": "What?", "answer": "<IMAGE>"}, "a text holds <IMAGE>"
    ),
    refused(
        "<image 2> for one image",
        {"image": A, "question": "See <image 2>", "answer": "a cat"},
        "in order, from 0 or 1",
    ),
    refused(
        "<image 2> and <image 3> for two images",
        {"images": [A, B], "question": "Is <image 2> like <image 3>?", "answer": "no"},
        "found ['<image 2>', '<image 3>']",
    ),
    refused(
        "<image 2> where image_1 is null",
        {"image_1": None, "image_2": B, "question": "See <image 2>", "answer": "a cat"},
        "in order, from 0 or 1",
    ),
    read(
        "Images by tag, ten and more",
        {
            "image": {f"<image_{number}>": B if number == 10 else A for number in (10, *range(10))},
            "question": "Same?",
            "answer": "no",
        },
        meant("Same?", "no", images=(*[A] * 10, B)),
    ),
]

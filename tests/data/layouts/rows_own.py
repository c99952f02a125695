"""People's own rows: images under other names, keys that nobody knows, and data.columns."""

from tests.data.layouts.layout import Layout
from tests.data.layouts.rows import CLIP, A, B, chat, frames, meant, read, refused, writes

ONE = meant("What is it?", "a cat")
ASKED = {"question": "What is it?", "answer": "a cat"}
NAMES = (
    *("image_name", "img_name", "image_path", "img", "img_path", "filename", "file", "imgname", "image_file"),
    *("image_file_name", "Image", "imageFile", "Image Path", "file_path"),
)

LAYOUTS = [
    *(read(f"An image under {name}", {name: A, **ASKED}, ONE) for name in NAMES),
    read(
        "{video, frames, question, answer}",
        {"video": CLIP, "frames": 3, **ASKED},
        meant("What is it?", "a cat", images=frames(0, 5, 11)),
        files=(CLIP,),
    ),
    read(
        "A video of fewer frames than asked for",
        {"video": CLIP, "frames": 40, **ASKED},
        meant("What is it?", "a cat", images=frames(*range(12))),
        files=(CLIP,),
    ),
    read(
        "A video without <video> comes before an <image>",
        {"video": CLIP, "frames": 1, "image": A, "question": "Like <image>?", "answer": "no"},
        meant("<image>Like <image>?", "no", images=(*frames(5), A)),
        files=(A, CLIP),
    ),
    read(
        "A video and <video> as text, with data.ignore",
        {"video": CLIP, "frames": 1, "question": "What is a <video>?", "answer": "this"},
        meant("<image>What is a <video>?", "this", images=frames(5)),
        files=(CLIP,),
        ignore=["<video>"],
    ),
    refused(
        "A video's object with start",
        {"video": {"path": CLIP, "start": 3}, **ASKED},
        "of which ['start'] is not read",
    ),
    refused("A video that is not there", {"video": "none.mp4", **ASKED}, "none.mp4' does not exist"),
    refused("A video that is an image", {"video": A, **ASKED}, "no video that is known"),
    refused(
        "A video, frames of nothing",
        {"video": CLIP, "frames": 0, **ASKED},
        "frames is int 0; wanted how many",
    ),
    refused("Frames of no video", {"image": A, "frames": 3, **ASKED}, "the key 'frames'"),
    read(
        "Images under file_names (imagefolder)",
        {"file_names": [A, B], **ASKED},
        meant("What is it?", "a cat", images=(A, B)),
    ),
    read(
        "Images under image_1, image_2",
        {"image_2": B, "image_1": A, **ASKED},
        meant("What is it?", "a cat", images=(A, B)),
    ),
    *(
        refused(
            f"An image's object with {key}",
            {"image": {"path": A, key: value}, **ASKED},
            f"of which ['{key}'] is not read",
        )
        for key, value in (
            ("page", 3),
            ("frame", 0),
            ("crop", [0, 0, 2, 2]),
            ("bbox", [0, 0, 2, 2]),
            ("rotate", 90),
        )
    ),
    refused(
        "An image's object with path and base64",
        {"image": {"path": A, "base64": "aGVsbG8="}, **ASKED},
        "given more than once, under ['base64', 'path']",
    ),
    refused("An image's object of two names", {"image": {"path": A, "image": B}, **ASKED}, "more than once"),
    read(
        "An image's object with base64",
        {"image": {"base64": "aGVsbG8="}, **ASKED},
        meant("What is it?", "a cat", images=(b"hello",)),
    ),
    read(
        "An image's object of COCO",
        {"image": {"id": 7, "file_name": A, "coco_url": "http://x/a.png", "width": 2, "height": 2}, **ASKED},
        ONE,
    ),
    refused(
        "A part of an image with bbox",
        {
            "messages": chat(
                [
                    {"type": "image", "image": A, "bbox": [0, 0, 1, 1]},
                    {"type": "text", "text": "What is it?"},
                ],
                "a cat",
            )
        },
        "of which ['bbox'] is not read",
    ),
    refused(
        "A part of two images",
        {
            "messages": chat(
                [{"type": "image", "image": A, "path": B}, {"type": "text", "text": "What is it?"}], "a cat"
            )
        },
        "more than once",
    ),
    read(
        "Images as a JSON list in a cell",
        {"images": '["a.png", "b.png"]', **ASKED},
        meant("What is it?", "a cat", images=(A, B)),
    ),
    read(
        "An image's name with back slashes",
        {"image": "sub\\a.png", **ASKED},
        {**ONE, "images": ["sub/a.png"]},
        files=("sub/a.png",),
    ),
    read("An image by file://", {"image": "file://a.png", **ASKED}, ONE),
    refused(
        "An image under a name that nobody knows",
        {"photo": A, **ASKED},
        "the key 'photo' (str 'a.png', an image's name): not understood",
    ),
    read(
        "An image under such a name, in data.columns", {"photo": A, **ASKED}, ONE, columns={"image": "photo"}
    ),
    refused("An image as the id", {"id": A, **ASKED}, "the id 'a.png' names an image"),
    read("An image as the id, in data.columns", {"id": A, **ASKED}, ONE, columns={"image": "id"}),
    refused("An image inside of metadata", {"metadata": {"file": A}, **ASKED}, "the key 'metadata'"),
    refused("An image under source", {"source": A, **ASKED}, "the key 'source'"),
    refused(
        "An absolute path outside of the folder",
        {"image": "/elsewhere/a.png", **ASKED},
        "outside the image root",
    ),
    refused(
        "A misspelt key", {"image": A, "question": "What is it?", "anwser": "a cat"}, "closest to 'answer'"
    ),
    read(
        "data.columns for all three",
        {"picture": A, "asks": "What is it?", "says": "a cat"},
        ONE,
        columns={"image": "picture", "question": "asks", "answer": "says"},
    ),
    read(
        "data.columns for a mix of known names",
        {"img_name": A, "prompt": "What is it?", "response": "a cat"},
        ONE,
        columns={"image": "img_name", "question": "prompt", "answer": "response"},
    ),
    refused(
        "data.columns onto a key that is there",
        {**ASKED, "says": "no"},
        "data.columns gives answer the column 'says', but the row has 'answer' too",
        columns={"answer": "says"},
    ),
    read(
        "data.columns onto a key that is there, and data.ignore",
        {**ASKED, "says": "no"},
        meant("What is it?", "no", images=()),
        columns={"answer": "says"},
        ignore=["answer"],
    ),
    refused("A key that nobody knows", {**ASKED, "note": "dark"}, "the key 'note'"),
    read(
        "A key that nobody knows, in data.ignore",
        {**ASKED, "note": "dark"},
        meant("What is it?", "a cat", images=()),
        ignore=["note"],
    ),
    read(
        "Bookkeeping: source, split, license, language",
        {
            "image": A,
            **ASKED,
            "source": "own",
            "split": "train",
            "license": "CC0",
            "language": "en",
            "metadata": {"by": "me"},
        },
        ONE,
    ),
    *(
        Layout(
            f"Rows of several splits in one file, under {key}",
            writes([{"image": A, **ASKED, key: own} for own in ("train", "test")]),
            refused="is of the split 'test'",
        )
        for key in ("split", "Split", "subset", "Data-Split", "set_name")
    ),
    *(
        Layout(
            f"Rows of several splits in one file, {first} and {second}",
            writes([{"image": A, **ASKED, "split": own} for own in (first, second)]),
            refused=f"is of the split '{second}'",
        )
        for first, second in (("train", "holdout"), ("trn", "tst"), (0, 1))
    ),
    Layout(
        "Rows of several splits in one file, holdout named",
        lambda folder: (
            writes(
                [{"image": own, **ASKED, "split": split} for own, split in ((A, "train"), (B, "holdout"))]
            )(folder)
            + ":holdout"
        ),
        records=[meant("What is it?", "a cat", images=(B,))],
    ),
    Layout(
        "Rows of a split, one without",
        writes([{"image": A, **ASKED, "split": "test"}, {"image": A, **ASKED}]),
        refused="is of no split, rows above of one",
    ),
    Layout(
        "Rows without a split, one of test",
        writes([{"image": A, **ASKED}, {"image": A, **ASKED, "split": "test"}]),
        refused="is of the split 'test', rows above of none",
    ),
    Layout(
        "Rows of several subsets that are no splits",
        writes([{"image": A, **ASKED, "subset": own} for own in ("charts", "maps")]),
        records=[ONE, ONE],
    ),
    Layout(
        "Rows of several splits in one file, with blanks",
        writes([{"image": A, **ASKED, "SPLIT": own} for own in ("Train ", "TEST")]),
        refused="is of the split 'TEST'",
    ),
    Layout(
        "Rows of several splits in one file, one named",
        lambda folder: (
            writes([{"image": own, **ASKED, "Subset": split} for own, split in ((A, "train"), (B, "val"))])(
                folder
            )
            + ":validation"
        ),
        records=[meant("What is it?", "a cat", images=(B,))],
    ),
    Layout(
        "Rows of several splits in one file, all named",
        lambda folder: (
            writes([{"image": A, **ASKED, "split": own} for own in ("train", "test")])(folder) + ":train+test"
        ),
        records=[ONE, ONE],
    ),
    refused("A car's make and model", {"image": A, "label": "red", "model": "x5"}, "the key 'model'"),
    read("Keys that say nothing", {"image": A, **ASKED, "note": "", "tags": [], "extra": None}, ONE),
    refused(
        "Nothing that is known", {"a_column": 1, "b_column": 2}, "found the keys ['a_column', 'b_column']"
    ),
]

"""Sets of captions and classes as they are published since 2024, exports of annotation tools, and Kaggle's tables."""

import base64

from tests.data.layouts.layout import Layout
from tests.data.layouts.rows import CAPTION, CLASS, A, B, meant, read, refused
from tests.data.layouts.sets_documents import held
from tests.data.layouts.sets_questions import IMAGE, hub
from tests.data.layouts.writing import images, lines, png, saved, table, tar, text

ONE = meant(CAPTION, "a cat")
HELD = meant(CAPTION, "a cat", images=(png(),))
SEVERAL = ["a cat", "one cat"]
STUDIO = {
    "id": 1,
    "annotator": 1,
    "annotation_id": 1,
    "created_at": "2025",
    "updated_at": "2025",
    "lead_time": 1.2,
}
BOXES = "0 0.5 0.5 1 1\n1 0.2 0.2 0.1 0.1\n"


def beside(content: str):
    """An image and a text of its name."""

    def write(folder):
        images(folder / "set", "1.jpg")
        text(folder, "set/1.txt", content)
        return "set"

    return write


def csv(*rows: list[str], file: str = "d.csv", **how):
    def write(folder):
        images(folder, A)
        return table(folder, file, *rows, **how)

    return write


def folder_of(*names: str, source: str = "set"):
    """Images, and texts of nothing."""

    def write(folder):
        for name in names:
            images(folder, f"set/{name}") if name.endswith("g") else text(folder, f"set/{name}", "x")
        return source

    return write


def arrow(folder):
    row = {"image": IMAGE, "caption": "a cat"}
    saved(folder, "cache", {"": [row]})
    (found,) = (folder / "cache").glob("*.arrow")
    found.rename(folder / "d.arrow")
    return "d.arrow"


def roboflow(folder):
    images(folder, f"set/train/{A}")
    lines(
        folder,
        "set/train/_annotations.train.jsonl",
        {"image": A, "prefix": "detect cat", "suffix": "<loc0001> cat"},
    )
    return "set/train/_annotations.train.jsonl"


LAYOUTS = [
    hub(
        "Flickr30k on the hub, captions beside sentids",
        {
            "image": IMAGE,
            "caption": SEVERAL,
            "sentids": ["0", "1"],
            "split": "train",
            "img_id": "0",
            "filename": "1.jpg",
        },
        {**HELD, "references": SEVERAL},
    ),
    hub("MedTrinity, {image, id, caption}", {"image": IMAGE, "id": "1.jpg", "caption": "a cat"}, HELD),
    hub("LaTeX-OCR, {image, text}", {"image": IMAGE, "text": "a cat"}, HELD),
    refused(
        "PMC-OA, how its caption was found",
        {"image": A, "caption": "a cat", "alignment_type": "x"},
        "the key 'alignment_type'",
    ),
    hub(
        "LAION, {URL, TEXT}",
        {"URL": "https://example.org/a.jpg", "TEXT": "a cat", "WIDTH": 2},
        refused="'URL' is an address of the web",
    ),
    hub(
        "DataComp, {url, text}",
        {"uid": "1", "url": "https://example.org/a.jpg", "text": "a cat", "sha256": "0"},
        refused="download the images first",
    ),
    refused(
        "PixMo-cap, image_url of the web",
        {"image_url": "https://example.org/a.jpg", "caption": "a cat"},
        "download URLs first",
    ),
    refused(
        "Winoground, two captions of two images",
        {"id": 0, "image_0": A, "image_1": B, "caption_0": "a b", "caption_1": "b a"},
        "found the keys ['caption_0', 'caption_1'",
    ),
    held(
        "SugarCrepe, a negative_caption",
        {"0": {"filename": A, "caption": "a cat", "negative_caption": "a dog"}},
        refused="the key 'negative_caption'",
    ),
    refused(
        "VSR, a caption that is true or not",
        {"image": A, "caption": "It is a cat.", "label": 1, "relation": "is"},
        "a number without its name",
    ),
    refused(
        "MMC4, texts and images apart",
        {"text_list": ["a"], "image_info": [{"image_name": A}], "url": "x"},
        "found the keys ['image_info'",
    ),
    held(
        "MiniGPT-4 filter_cap.json",
        {"annotations": [{"image_id": "2", "caption": "a cat"}]},
        meant(CAPTION, "a cat", images=("2.jpg",)),
        files=("2.jpg",),
    ),
    held(
        "Kohya's meta_cap.json, rows by their images",
        {A: {"caption": "a cat"}, B: {"caption": "a dog"}},
        ONE,
        meant(CAPTION, "a dog", images=(B,)),
    ),
    held("Captions by their images", {A: "a cat", B: "a dog"}, ONE, meant(CAPTION, "a dog", images=(B,))),
    held("Several captions by their images", {A: SEVERAL}, {**ONE, "references": SEVERAL}),
    held(
        "Captions by their images, and a key that is none",
        {A: "a cat", "made by": "me"},
        refused="found the keys",
    ),
    held(
        "DiffusionDB part.json",
        {A: {"p": "a cat", "se": 1, "sa": "k_lms"}},
        refused="found the keys ['image', 'p', 'sa', 'se']",
    ),
    held(
        "RedCaps, what is known of each",
        {"info": {}, "annotations": [{"image_id": "a", "caption": "a cat", "raw_caption": "A Cat"}]},
        refused="the key 'raw_caption'",
    ),
    Layout(
        "Flickr30k Entities, a text of marks",
        beside("[/EN#1/people A man] sits .\n"),
        refused="a text holds [/EN#1/people",
    ),
    Layout("YOLO, boxes beside an image", beside(BOXES), refused="holds boxes, as YOLO writes them"),
    Layout(
        "A number beside an image (a plate, a count)",
        beside("42\n"),
        [meant(CAPTION, "42", images=("set/1.jpg",))],
    ),
    Layout(
        "YOLO, images/ and labels/",
        folder_of("images/1.jpg", "labels/1.txt", "data.yaml"),
        refused="holds ['data.yaml', 'images', 'labels']",
    ),
    Layout(
        "YOLO, classes of a split",
        folder_of("train/cat/1.jpg", "train/dog/1.jpg", "val/cat/2.jpg", "val/dog/2.jpg", source="set:train"),
        [
            {
                **meant(CLASS, name, images=(f"{name}/1.jpg",)),
                "images": [f"set/train/{name}/1.jpg"],
                "choices": ["cat", "dog"],
            }
            for name in ("cat", "dog")
        ],
    ),
    Layout(
        "Pascal VOC, JPEGImages/ and Annotations/",
        folder_of("JPEGImages/1.jpg", "Annotations/1.xml"),
        refused="holds ['Annotations', 'JPEGImages']",
    ),
    Layout(
        "MVTec, ground_truth/ beside splits",
        folder_of("train/good/1.png", "test/crack/2.png", "ground_truth/crack/2.png"),
        refused="holds ['ground_truth', 'test', 'train']",
    ),
    Layout(
        "CVAT and VOC, annotations.xml",
        lambda f: text(f, "annotations.xml", "<annotations/>"),
        refused="ends in '.xml'",
    ),
    held(
        "Datumaro, categories beside items",
        {"info": {}, "categories": {"label": {}}, "items": [{"id": "a"}]},
        refused="found ['categories']",
    ),
    held(
        "VIA, regions and attributes",
        {f"{A}99": {"filename": A, "regions": [], "file_attributes": {"caption": "a cat"}}},
        refused="found the keys ['file_attributes', 'filename', 'id', 'regions']",
    ),
    Layout(
        "Roboflow, JSONL for PaliGemma",
        roboflow,
        [meant("detect cat", "<loc0001> cat", images=(f"set/train/{A}",))],
    ),
    held(
        "Roboflow and COCO, boxes",
        {
            "categories": [{"id": 0, "name": "cat"}],
            "images": [{"id": 0, "file_name": A}],
            "annotations": [{"id": 0, "image_id": 0, "category_id": 0, "bbox": [1, 1, 1, 1], "area": 1}],
        },
        refused="found the keys ['area', 'bbox', 'category_id'",
    ),
    read("Label Studio JSON-MIN, a choice", {"image": A, "choice": "cat", **STUDIO}, meant(CLASS, "cat")),
    read("Label Studio JSON-MIN, a caption", {"image": A, "caption": "a cat", **STUDIO}, ONE),
    refused(
        "Label Studio JSON, results of annotations",
        {"id": 1, "annotations": [{"result": []}, {"id": 2}], "data": {"image": A}},
        "found the keys ['annotations', 'data', 'id']",
    ),
    Layout(
        "Kaggle, the number of a class in a table",
        csv(["image_id", "label"], [A, "3"]),
        refused="label is str '3', a number without its name",
    ),
    Layout(
        "A number that a table asks for",
        csv(["image_id", "question", "label"], [A, "How many?", "3"]),
        [meant("How many?", "3")],
    ),
    Layout(
        "Kaggle, an image and its Id",
        csv(["Image", "Id"], [A, "w_1"]),
        refused="found the keys ['Id', 'Image']",
    ),
    Layout(
        "NIH ChestX-ray14, Image Index and Finding Labels",
        csv(["Image Index", "Finding Labels"], [A, "Mass"]),
        refused="found the keys ['Finding Labels', 'Image Index']",
    ),
    Layout(
        "The same, in data.columns",
        csv(["Image Index", "Finding Labels"], [A, "Mass"]),
        [meant(CLASS, "Mass")],
        settings={"columns": {"image": "Image Index", "label": "Finding Labels"}},
    ),
    Layout(
        "Conceptual Captions, no header",
        lambda f: text(f, "train.tsv", "a very typical bus station\thttps://example.org/a.jpg\n"),
        refused="which is no name of a column",
    ),
    Layout(
        "MMBench, a TSV of images as base64",
        csv(
            ["index", "question", "A", "B", "C", "answer", "image", "l2-category"],
            [
                "0",
                "What is it?",
                "a dog",
                "a cat",
                "",
                "B",
                base64.b64encode(png() + bytes(2000)).decode(),
                "x",
            ],
            file="d.tsv",
            delimiter="\t",
        ),
        [{**meant("What is it?", "a cat"), "images": [png() + bytes(2000)], "choices": ["a dog", "a cat"]}],
    ),
    Layout("An Arrow file of datasets' cache", arrow, [HELD]),
    Layout(
        "WebDataset: endings in capitals",
        lambda f: tar(f, "d.tar", [("1.PNG", png()), ("1.TXT", "a cat")]),
        [HELD],
    ),
    Layout(
        "WebDataset: a name of several endings",
        lambda f: tar(f, "d.tar", [("1.input.png", png()), ("1.text.txt", "a cat")]),
        refused=".text.txt",
    ),
]

"""Layouts of parquet, Arrow, tars, folders and sets of the hub."""

import io
import tarfile
from pathlib import Path

from tests.data.layouts.layout import Layout
from tests.data.layouts.writing import images, lines, parquet, png, saved, table, tar, text

QUESTION = "What is in this image?"
ROWS = [{"image": {"bytes": png(), "path": "1.png"}, "question": "Which?", "answer": "this"}]
MEANT = [{"images": [png()], "turns": [("<image>Which?", "this")]}]
IMAGE = {"_type": "Image"}
LABEL = {"names": ["cat", "dog"], "_type": "ClassLabel"}
CLASSES = [{"images": [png()], "turns": [(f"<image>{QUESTION}", "dog")], "choices": ["cat", "dog"]}]
CAPTION = ("<image>Describe this image.", "a dog")


def shards(*names: str, folder: str = ""):
    def write(into: Path) -> str:
        for name in names:
            parquet(into, f"set/{folder}{name}", *ROWS)
        return "set"

    return write


def class_labels(folder: Path) -> str:
    rows = [{"image": ROWS[0]["image"], "label": 1}]
    return parquet(folder, "a.parquet", *rows, features={"image": IMAGE, "label": LABEL})


def saved_classes(folder: Path) -> str:
    import datasets

    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"]))
    return saved(folder, "saved", {"": [{"image": ROWS[0]["image"], "label": 1}]}, features)


def class_folders(*extra: str):
    def write(folder: Path) -> str:
        images(folder / "set", "cat/1.png", "dog/2.png", *extra)
        return "set"

    return write


def split_class_folders(folder: Path) -> str:
    images(folder, *(f"set/{split}/{name}/1.png" for split in ("train", "test") for name in ("cat", "dog")))
    return "set:test"


def classes_of_splits(test: tuple[str, ...], source: str):
    """Cat, cow and dog in train/, and what is in test/."""

    def write(folder: Path) -> str:
        images(folder, *(f"set/train/{name}/1.png" for name in ("cat", "cow", "dog")))
        images(folder, *(f"set/test/{name}" for name in test))
        return source

    return write


def side_cars(*extra: str):
    def write(folder: Path) -> str:
        images(folder / "set", "1.png", "2.jpg", *extra)
        text(folder, "set/1.txt", "a dog\n")
        text(folder, "set/2.txt", "two dogs\n")
        return "set"

    return write


def imagefolder(name: str, key: str = "file_name", value=None):
    def write(folder: Path) -> str:
        images(folder / "set", "1.png", "2.png")
        if name.endswith("csv"):
            table(folder, f"set/{name}", [key, "text"], ["1.png", "a dog"])
        elif name.endswith("parquet"):
            parquet(folder, f"set/{name}", {key: "1.png", "text": "a dog"})
        else:
            lines(folder, f"set/{name}", {key: value or "1.png", "text": "a dog"})
        return "set"

    return write


def split_folders(folder: Path) -> str:
    for split in ("train", "test"):
        images(folder / f"set/{split}", "1.png")
        lines(folder, f"set/{split}/metadata.jsonl", {"file_name": "1.png", "text": f"a dog of {split}"})
    return "set"


def webdataset(*members: tuple[str, bytes | str]):
    return lambda folder: tar(folder, "shard-000000.tar", members)


def odd_member(name: str, kind: bytes):
    def write(folder: Path) -> str:
        with tarfile.open(folder / "shard.tar", "w") as archive:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/hostname"
            archive.addfile(info, io.BytesIO())
        return "shard.tar"

    return write


def cut_tar(folder: Path) -> str:
    name = webdataset(("1.png", png()), ("1.txt", "a dog"), ("2.png", png() * 900), ("2.txt", "a cat"))(
        folder
    )
    (folder / name).write_bytes((folder / name).read_bytes()[:30_000])
    return name


FOLDER = [{"images": ["set/1.png"], "turns": [CAPTION]}]
IN_TAR = [{"images": [png()], "turns": [CAPTION]}]
MVTEC = (
    "set/train/good/1.png",
    "set/test/good/1.png",
    "set/test/scratch/1.png",
    "set/ground_truth/scratch/1.png",
)
LAYOUTS = [
    Layout("parquet with images as bytes", lambda f: parquet(f, "a.parquet", *ROWS), MEANT),
    Layout("parquet with images by name", imagefolder("metadata.parquet"), FOLDER),
    Layout("parquet of the hub: image and class number", class_labels, CLASSES),
    Layout(
        "parquet: classes as answers",
        lambda f: parquet(f, "a.parquet", {"question": "Which?", "answer": 0}, features={"answer": LABEL}),
        [{"images": [], "turns": [("Which?", "cat")], "choices": ["cat", "dog"]}],
    ),
    Layout("parquet that is cut", lambda f: text(f, "a.parquet", "PAR1"), refused="not readable as parquet"),
    Layout("folder of parquet shards, no splits", shards("a.parquet", "b.parquet"), MEANT * 2),
    Layout(
        "folder of train-* and test-* shards",
        shards("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"),
        refused="set:test",
    ),
    Layout(
        "the same as folder:train",
        lambda f: shards("train-00000-of-00001.parquet", "test-00000-of-00001.parquet")(f) + ":train",
        MEANT,
    ),
    Layout(
        "download of a hub set: data/ with shards of splits",
        lambda f: shards("train-0.parquet", "validation-0.parquet", folder="data/")(f) + ":val",
        MEANT,
    ),
    Layout(
        "folder of shards of which one is missing",
        shards("train-00000-of-00003.parquet", "train-00002-of-00003.parquet"),
        refused="train-00001-of-00003",
    ),
    Layout(
        "folder of shards of a split and others",
        shards("train-00000-of-00001.parquet", "extra.parquet"),
        refused="extra.parquet",
    ),
    Layout("save_to_disk of a Dataset", lambda f: saved(f, "saved", {"": ROWS}), MEANT),
    Layout("save_to_disk with classes", saved_classes, CLASSES),
    Layout(
        "save_to_disk of a DatasetDict",
        lambda f: saved(f, "saved", {"train": ROWS, "validation": ROWS}),
        refused="saved:train",
    ),
    Layout(
        "save_to_disk of a DatasetDict, folder:val",
        lambda f: saved(f, "saved", {"train": ROWS * 2, "validation": ROWS}) + ":val",
        MEANT,
    ),
    Layout("imagefolder with metadata.jsonl", imagefolder("metadata.jsonl"), FOLDER),
    Layout("imagefolder with metadata.csv", imagefolder("metadata.csv"), FOLDER),
    Layout("imagefolder with image_file_name", imagefolder("metadata.jsonl", "image_file_name"), FOLDER),
    Layout("imagefolder with scan_file_name", imagefolder("metadata.jsonl", "scan_file_name"), FOLDER),
    Layout(
        "imagefolder with file_names",
        imagefolder("metadata.jsonl", "file_names", ["1.png", "2.png"]),
        [{"images": ["set/1.png", "set/2.png"], "turns": [("<image>" + CAPTION[0], "a dog")]}],
    ),
    Layout("imagefolder with train/ and test/ metadata", split_folders, refused="set:test"),
    Layout(
        "the same as folder:test",
        lambda f: split_folders(f) + ":test",
        [{"images": ["set/test/1.png"], "turns": [("<image>Describe this image.", "a dog of test")]}],
    ),
    Layout(
        "folder of class folders",
        class_folders(),
        [
            {
                "images": ["set/cat/1.png"],
                "turns": [(f"<image>{QUESTION}", "cat")],
                "choices": ["cat", "dog"],
            },
            {
                "images": ["set/dog/2.png"],
                "turns": [(f"<image>{QUESTION}", "dog")],
                "choices": ["cat", "dog"],
            },
        ],
    ),
    Layout(
        "folder of images/ and masks/",
        lambda f: (images(f, "set/images/1.png", "set/masks/1.png"), "set")[1],
        refused="'images' beside 1 other",
    ),
    Layout(
        "folder of class folders and a lone image", class_folders("3.png"), refused="wanted metadata.jsonl"
    ),
    Layout(
        "folder of splits of class folders, folder:test",
        split_class_folders,
        [
            {
                "images": [f"set/test/{c}/1.png"],
                "turns": [(f"<image>{QUESTION}", c)],
                "choices": ["cat", "dog"],
            }
            for c in ("cat", "dog")
        ],
    ),
    *(
        Layout(
            f"folder of splits of class folders, {source} of fewer classes",
            classes_of_splits(("dog/1.png",), source),
            [
                {
                    "images": ["set/test/dog/1.png"],
                    "turns": [(f"<image>{QUESTION}", "dog")],
                    "choices": ["cat", "cow", "dog"],
                }
            ],
        )
        for source in ("set:test", "set/test")
    ),
    Layout(
        "folder of splits of class folders, a class that only test has",
        classes_of_splits(("cow/1.png", "emu/1.png"), "set:test"),
        [
            {
                "images": [f"set/test/{c}/1.png"],
                "turns": [(f"<image>{QUESTION}", c)],
                "choices": ["cat", "cow", "dog", "emu"],
            }
            for c in ("cow", "emu")
        ],
    ),
    Layout(
        "folder of splits of class folders beside a test/ of images alone, folder/train",
        classes_of_splits(("1.png",), "set/train"),
        [
            {
                "images": [f"set/train/{c}/1.png"],
                "turns": [(f"<image>{QUESTION}", c)],
                "choices": ["cat", "cow", "dog"],
            }
            for c in ("cat", "cow", "dog")
        ],
    ),
    Layout(
        "folder of one class folder", lambda f: (images(f, "set/cat/1.png"), "set")[1], refused="two classes"
    ),
    Layout(
        "folder of class folders, one without images",
        lambda f: (images(f, "set/cat/1.png"), (f / "set/dog").mkdir(), "set")[2],
        refused="two classes",
    ),
    Layout(
        "folder of images with a .txt each (kohya, BLIP)",
        side_cars(),
        [
            {"images": ["set/1.png"], "turns": [CAPTION]},
            {"images": ["set/2.jpg"], "turns": [("<image>Describe this image.", "two dogs")]},
        ],
    ),
    Layout("the same, an image without .txt", side_cars("3.png"), refused="3.png"),
    Layout(
        "folder of images with questions and answers each (MME)",
        lambda f: (images(f, "set/1.png"), text(f, "set/1.txt", "A cat?\tYes\nA dog?\tNo\n"), "set")[2],
        refused="questions and their answers, as MME writes them",
    ),
    Layout(
        "MVTec, set/test beside ground_truth/",
        lambda f: (images(f, *MVTEC), "set/test")[1],
        [
            {
                "images": [f"set/test/{c}/1.png"],
                "turns": [(f"<image>{QUESTION}", c)],
                "choices": ["good", "scratch"],
            }
            for c in ("good", "scratch")
        ],
    ),
    Layout(
        "MVTec, set:test",
        lambda f: (images(f, *MVTEC), "set:test")[1],
        refused="name the folder of one, such as",
    ),
    Layout("WebDataset: image and .txt", webdataset(("0001.png", png()), ("0001.txt", "a dog\n")), IN_TAR),
    Layout(
        "WebDataset: image and .json",
        webdataset(("a/1.json", '{"question": "Which?", "answer": "this"}'), ("a/1.png", png())),
        MEANT,
    ),
    Layout(
        "WebDataset of img2dataset",
        webdataset(
            ("0001.png", png()),
            ("0001.txt", "a dog"),
            ("0001.json", '{"caption": "a dog", "url": "x", "key": "0001", "status": "success", "width": 2}'),
        ),
        IN_TAR,
    ),
    Layout(
        "WebDataset: image and .cls with a name",
        webdataset(("1.png", png()), ("1.cls", "dog")),
        [{"images": [png()], "turns": [(f"<image>{QUESTION}", "dog")]}],
    ),
    Layout(
        "WebDataset: a class number", webdataset(("1.png", png()), ("1.cls", "3")), refused="the number 3"
    ),
    Layout(
        "WebDataset: two images a sample", webdataset(("1.a.png", png()), ("1.b.png", png())), refused="a.png"
    ),
    Layout("WebDataset: a pickle", webdataset(("1.png", png()), ("1.pyd", "x")), refused="1.pyd"),
    Layout("WebDataset: ../x", webdataset(("../1.png", png())), refused="leads out of the archive"),
    Layout("WebDataset: a link", odd_member("1.png", tarfile.SYMTYPE), refused="a link or a device"),
    Layout("WebDataset: a device", odd_member("1.png", tarfile.CHRTYPE), refused="a link or a device"),
    Layout("WebDataset: a cut shard", cut_tar, refused="cut or damaged after byte"),
    Layout(
        "hub id without a way to the hub", lambda f: "user/name:train", refused="neither a file nor a folder"
    ),
]
